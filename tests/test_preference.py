"""Log-probabilities and alignment losses against hand-typed values and loops in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mlc_min.preference import dpo_loss, orpo_loss, sequence_logps, sft_loss, simpo_loss

seeds = st.integers(0, 10**6)
LOSSES = {  # each from chosen, rejected, their references and their lengths
    "sft": lambda c, r, ref_c, ref_r, len_c, len_r: sft_loss(c, len_c),
    "dpo": lambda c, r, ref_c, ref_r, len_c, len_r: dpo_loss(c, r, ref_c, ref_r),
    "simpo": lambda c, r, ref_c, ref_r, len_c, len_r: simpo_loss(c, r, len_c, len_r),
    "orpo": lambda c, r, ref_c, ref_r, len_c, len_r: orpo_loss(c, r, len_c, len_r),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed))


def batch(seed, n, length, vocabulary):
    """Random token ids and response masks: spans [start, end) with 1 <= start < end <= length."""
    g = generator(seed)
    ids = torch.randint(vocabulary, (n, length), generator=g)
    spans = [sorted((torch.randperm(length, generator=g)[:2] + 1).tolist()) for _ in range(n)]
    at = torch.arange(length)
    mask = torch.stack([(start <= at) & (at < end) for start, end in spans])
    return ids, mask, spans


def loop_logps(logits, ids, spans):
    """Sum over the response of log p(token t | logits at t - 1), one token at a time in float64."""
    logits = logits.double().numpy()
    sums = []
    for row, (start, end) in enumerate(spans):
        total = 0.0
        for t in range(start, end):
            total += logits[row, t - 1, ids[row, t]] - np.log(np.exp(logits[row, t - 1]).sum())
        sums.append(total)
    return np.array(sums)


def sample_logps(seed, n=5):
    """Chosen, rejected, their references (summed log-probs, float64) and their lengths."""
    g = generator(seed)
    len_c, len_r = torch.randint(1, 30, (2, n), generator=g)
    c, r, ref_c, ref_r = -0.01 - 4 * torch.rand(4, n, generator=g, dtype=torch.float64)  # per token
    return c * len_c, r * len_r, ref_c * len_c, ref_r * len_r, len_c, len_r


def softplus(x):
    """-log sigmoid(-x), which is log(1 + e^x), in float64."""
    return np.logaddexp(0, np.asarray(x, dtype=np.float64))


# --- sequence_logps ---


def test_logps_by_hand():
    """Usually the shift by one is missing (the output at t - 1 predicts token t), or a mean stands for the sum."""
    probabilities = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [1 / 3, 1 / 3, 1 / 3]]
    logits = torch.tensor([probabilities, probabilities]).log() + 2.0  # logits need not be normalised
    ids = torch.tensor([[0, 1, 2, 0], [2, 2, 0, 2]])
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    sums, lengths = sequence_logps(logits, ids, mask)
    assert sums.tolist() == pytest.approx([-1.7429693, -3.2188758])  # log(0.25 · 0.7), log(0.1 · 0.4)
    assert lengths.tolist() == [2, 2]


@given(n=st.integers(1, 5), length=st.integers(2, 12), vocabulary=st.integers(2, 9), seed=seeds)
def test_logps_equal_a_loop_in_float64(n, length, vocabulary, seed):
    """Usually the shift goes the wrong way, or the mask is not shifted with the tokens."""
    logits = 3 * normal(seed, n, length, vocabulary)
    ids, mask, spans = batch(seed, n, length, vocabulary)
    sums, lengths = sequence_logps(logits, ids, mask)
    np.testing.assert_allclose(sums, loop_logps(logits, ids, spans), rtol=1e-5, atol=1e-5)
    assert lengths.tolist() == [end - start for start, end in spans]


def test_a_perfect_model_scores_zero_and_one_that_is_off_by_one_does_not():
    """Usually the shift by one is missing or goes the wrong way."""
    ids = torch.tensor([[3, 1, 4, 0, 5, 2]])
    mask = torch.tensor([[False, False, True, True, True, False]])
    perfect = 100.0 * F.one_hot(ids.roll(-1, 1), 6)  # position t names token t + 1
    assert sequence_logps(perfect, ids, mask)[0].tolist() == [0]
    for shift in (-1, 1):
        assert sequence_logps(perfect.roll(shift, 1), ids, mask)[0].tolist() == [-300]


@given(more=st.integers(1, 6), seed=seeds)
def test_padding_on_the_right_changes_nothing_whatever_it_holds(more, seed):
    """Usually the mask does not reach the sum, and padding is scored as well."""
    ids, mask, _ = batch(seed, 3, 8, 7)
    logits = normal(seed, 3, 8, 7)
    padding, _, _ = batch(seed + 1, 3, more + 2, 7)
    padded = (
        torch.cat([logits, 1e4 * normal(seed + 2, 3, more + 2, 7)], 1),
        torch.cat([ids, padding], 1),
        F.pad(mask, (0, more + 2)),
    )
    for expected, result in zip(sequence_logps(logits, ids, mask), sequence_logps(*padded), strict=True):
        assert torch.equal(expected, result)


def test_a_pad_token_equal_to_the_end_token_changes_nothing_and_the_end_token_is_scored():
    """Usually the mask is made from token values; it is given."""
    end, spans = 2, [(2, 4), (1, 6)]
    logits = normal(0, 2, 6, 5)
    results = []
    for pad in (0, end):
        ids = torch.tensor([[3, 4, 1, end, pad, pad], [4, 1, 3, 3, 1, end]])
        mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
        results.append(sequence_logps(logits, ids, mask)[0])
        np.testing.assert_allclose(results[-1], loop_logps(logits, ids, spans), rtol=1e-5)
    assert torch.equal(*results)


@given(seed=seeds)
def test_head_sees_response_positions_only_and_gives_what_full_logits_give(seed):
    """Usually `head` runs on all positions, and the mask comes after it."""
    states, weight = normal(seed, 4, 9, 6), normal(seed + 1, 11, 6)
    ids, mask, spans = batch(seed, 4, 9, 11)
    seen = []

    def head(x):
        seen.append(x)
        return x @ weight.T

    sums, lengths = sequence_logps(states, ids, mask, head)
    expected = torch.cat([row[start - 1 : end - 1] for row, (start, end) in zip(states, spans, strict=True)])
    assert torch.equal(torch.cat(seen), expected)
    assert len(expected) == lengths.sum()
    np.testing.assert_allclose(sums, sequence_logps(states @ weight.T, ids, mask)[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_upcast_before_the_softmax():
    """Usually `.float()` is missing, or comes after the softmax."""
    logits = (2 * normal(0, 1, 601, 500)).bfloat16()
    ids, mask = torch.randint(500, (1, 601), generator=generator(1)), torch.arange(601)[None] > 0
    exact = loop_logps(logits, ids, [(1, 601)])[0]
    sums, _ = sequence_logps(logits, ids, mask)
    assert sums.dtype == torch.float32
    assert sums.item() == pytest.approx(exact, rel=1e-6)
    in_bfloat16 = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).double().sum().item()
    assert abs(in_bfloat16 - exact) > 0.1  # what the upcast is there for


@given(seed=seeds)
def test_gradient_reaches_exactly_the_positions_that_predict_a_response_token(seed):
    """Usually the gradient also reaches the prompt, or the positions of the tokens themselves."""
    states = normal(seed, 3, 8, 7).requires_grad_()
    ids, mask, spans = batch(seed, 3, 8, 7)
    sequence_logps(states, ids, mask)[0].sum().backward()
    expected = np.zeros((3, 8, 7))
    for row, (start, end) in enumerate(spans):
        for t in range(start, end):  # one-hot minus softmax
            p = np.exp(states[row, t - 1].detach().double().numpy())
            expected[row, t - 1] = np.eye(7)[ids[row, t]] - p / p.sum()
    np.testing.assert_allclose(states.grad, expected, atol=1e-6)


def test_an_empty_response_is_refused_with_its_row():
    """Usually its sum is 0 and nobody notices."""
    ids, mask, _ = batch(0, 4, 6, 5)
    mask[2] = False
    with pytest.raises(ValueError, match="row 2 "):
        sequence_logps(normal(0, 4, 6, 5), ids, mask)


def test_a_response_at_position_0_is_refused():
    """Usually the shift drops that token silently."""
    ids, mask, _ = batch(0, 4, 6, 5)
    mask[1, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        sequence_logps(normal(0, 4, 6, 5), ids, mask)


# --- DPO ---


@pytest.mark.parametrize(
    ("policy", "reference", "beta", "loss"),
    [
        ((-10.0, -12.0), (-11.0, -11.0), 0.1, 0.5981389),  # margin 2: log(1 + e^-0.2)
        ((-12.0, -10.0), (-11.0, -11.0), 0.1, 0.7981389),  # margin -2: log(1 + e^0.2)
        ((-10.0, -12.0), (-11.0, -11.0), 0.5, 0.3132617),  # log(1 + e^-1)
        ((-20.0, -30.0), (-21.0, -41.0), 0.1, 1.3132617),  # margin 1 - 11 = -10: log(1 + e)
    ],
)
def test_dpo_by_hand(policy, reference, beta, loss):
    """Usually the reference is left out, added, or that of the other reply; or β is fixed or outside the sigmoid."""
    assert dpo_loss(*torch.tensor([*policy, *reference])[:, None], beta).tolist() == pytest.approx([loss])


@given(seed=seeds)
def test_dpo_is_log_2_where_policy_and_reference_agree(seed):
    """Usually the margin is not (policy - reference) of one minus (policy - reference) of the other."""
    chosen, rejected, *_ = sample_logps(seed)
    np.testing.assert_allclose(dpo_loss(chosen, rejected, chosen, rejected), math.log(2), rtol=1e-12)


@given(seed=seeds, beta=st.sampled_from([0.01, 0.1, 1.0]), constant=st.floats(-100, 100))
def test_dpo_symmetries_and_gradient(seed, beta, constant):
    """Usually chosen and rejected are exchanged, or one of the four log-probs is detached. If only the smallest
    gradients are wrong: log(sigmoid(x)) has no digits left there, logsigmoid(x) has."""
    c, r, ref_c, ref_r, *_ = sample_logps(seed)
    margin = (c - ref_c) - (r - ref_r)
    loss = dpo_loss(c.requires_grad_(), r.requires_grad_(), ref_c, ref_r, beta)
    swapped = dpo_loss(r, c, ref_r, ref_c, beta)
    np.testing.assert_allclose((loss - swapped).detach(), -beta * margin, atol=1e-9)
    # Only the difference of the chosen and the rejected counts, for the policy as for the reference.
    shifted = dpo_loss(c + constant, r + constant, ref_c - 2 * constant, ref_r - 2 * constant, beta)
    np.testing.assert_allclose(shifted.detach(), loss.detach(), rtol=1e-9, atol=1e-12)
    # The chosen is pushed up and the rejected down, equally, by β sigmoid(-β margin).
    loss.sum().backward()
    push = beta * np.exp(-softplus(beta * margin.numpy()))
    np.testing.assert_allclose(c.grad, -push, rtol=1e-9)
    np.testing.assert_allclose(r.grad, push, rtol=1e-9)
    assert (c.grad < 0).all() and (r.grad > 0).all()


def test_dpo_does_not_overflow_at_huge_margins():
    """Usually log(sigmoid(x)) is -infinity at large margins: use logsigmoid."""
    chosen = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = dpo_loss(chosen, torch.tensor([0.0, -1e4]), torch.zeros(2), torch.zeros(2), beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]


# --- SFT, SimPO, ORPO ---


@given(seed=seeds)
def test_sft_is_the_cross_entropy_per_token(seed):
    """Usually the sum is not divided by the response's length, or its sign is wrong."""
    logits = normal(seed, 4, 9, 6)
    ids, mask, spans = batch(seed, 4, 9, 6)
    expected = -loop_logps(logits, ids, spans) / [end - start for start, end in spans]
    np.testing.assert_allclose(sft_loss(*sequence_logps(logits, ids, mask)), expected, rtol=1e-5)


@given(seed=seeds, beta=st.sampled_from([0.5, 2.0, 10.0]), gamma=st.sampled_from([0.0, 1.0, 1.6]))
def test_simpo_equals_numpy(seed, beta, gamma):
    c, r, _, _, len_c, len_r = (x.numpy() for x in sample_logps(seed))
    loss = simpo_loss(*map(torch.from_numpy, (c, r, len_c, len_r)), beta, gamma)
    np.testing.assert_allclose(loss, softplus(gamma - beta * (c / len_c - r / len_r)), rtol=1e-9)


def test_simpo_compares_log_probs_per_token():
    """The same -2 nats per token in 3 and in 30 tokens: margin 0, so the loss is log(1 + e^γ)."""
    loss = simpo_loss(torch.tensor([-6.0]), torch.tensor([-60.0]), torch.tensor([3]), torch.tensor([30]), 2.0, 1.0)
    assert loss.tolist() == pytest.approx([1.3132617])


def orpo_by_numpy(chosen, rejected, beta):
    """From mean log-probs per token, in float64."""
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    log_odds = [x - np.log(-np.expm1(x)) for x in (chosen, rejected)]
    ratio = log_odds[0] - log_odds[1]
    return -chosen + beta * softplus(-ratio), ratio


@given(seed=seeds, beta=st.sampled_from([0.1, 1.0]))
def test_orpo_equals_numpy(seed, beta):
    c, r, _, _, len_c, len_r = sample_logps(seed)
    np.testing.assert_allclose(orpo_loss(c, r, len_c, len_r, beta), orpo_by_numpy(c / len_c, r / len_r, beta)[0], 1e-9)


def test_orpo_by_hand():
    """p = 1/2 and 1/4 per token: odds 1 and 1/3, so the loss is log 2 + 0.1 log(1 + 1/3)."""
    two, four = torch.tensor([2 * math.log(0.5)]), torch.tensor([4 * math.log(0.25)])
    assert orpo_loss(two, four, torch.tensor([2]), torch.tensor([4]), 0.1).tolist() == pytest.approx([0.7219154])


@pytest.mark.parametrize("near", [-1e-2, -1e-4, -1e-5, -2e-6])
def test_orpo_keeps_its_digits_in_float32_for_nearly_certain_responses(near):
    x = torch.tensor([near, -1.0, near])
    y = torch.tensor([-1.0, near, near])
    one = torch.ones(3, dtype=torch.int64)
    loss = orpo_loss(x.requires_grad_(), y.requires_grad_(), one, one)
    a, b = x.detach().double().numpy(), y.detach().double().numpy()
    expected, ratio = orpo_by_numpy(a, b, 0.1)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)
    loss.sum().backward()
    push = 0.1 * np.exp(-softplus(ratio))  # d log odds / dx = 1 / (1 - p)
    np.testing.assert_allclose(x.grad, -1 - push / -np.expm1(a), rtol=1e-4)
    np.testing.assert_allclose(y.grad, push / -np.expm1(b), rtol=1e-4)


@pytest.mark.parametrize("certain", [0.0, -1e-8])
def test_orpo_is_finite_for_certain_responses_where_the_naive_form_is_not(certain):
    x, one = torch.tensor([certain]), torch.tensor([1])
    assert torch.log1p(-torch.exp(x)).item() == -math.inf  # the form to avoid
    # p counts as 1 - 1e-6, a constant: log odds 13.81551, against -0.54132 of exp(-1).
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), x.clone().requires_grad_()
    loss = orpo_loss(chosen, rejected, one, one)
    loss.backward()
    assert loss.item() == pytest.approx(1 + 0.1 * 14.35683, rel=1e-5)
    assert chosen.grad.item() == pytest.approx(-1 - 0.1 / (1 - math.exp(-1)), rel=1e-5)
    assert rejected.grad.item() == pytest.approx(0.1, rel=1e-5)
    # The other way round, and both certain: log(1 + e^-14.35683), and log 2.
    assert orpo_loss(x, chosen.detach(), one, one).item() == pytest.approx(0.1 * 5.82e-7, rel=1e-3, abs=2e-8)
    both = [x.clone().requires_grad_() for _ in range(2)]
    loss = orpo_loss(*both, one, one)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * math.log(2), rel=1e-5)
    assert [a.grad.item() for a in both] == pytest.approx([-1.05, 0.05])


# --- every loss ---


def test_defaults_are_beta_0_1_for_dpo_and_orpo_and_beta_2_gamma_1_for_simpo():
    c, r, ref_c, ref_r, len_c, len_r = sample_logps(0)
    assert torch.equal(dpo_loss(c, r, ref_c, ref_r), dpo_loss(c, r, ref_c, ref_r, beta=0.1))
    assert torch.equal(orpo_loss(c, r, len_c, len_r), orpo_loss(c, r, len_c, len_r, beta=0.1))
    assert torch.equal(simpo_loss(c, r, len_c, len_r), simpo_loss(c, r, len_c, len_r, beta=2.0, gamma=1.0))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_maps_rows_to_rows_without_mixing_them(name):
    inputs = sample_logps(0, 6)
    together = LOSSES[name](*inputs)
    apart = torch.cat([LOSSES[name](*(x[k : k + 1] for x in inputs)) for k in range(6)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
    assert len(set(together.tolist())) == 6


@pytest.mark.parametrize("name", LOSSES)
def test_eight_rows_at_once_and_one_by_one_give_the_same_loss_and_gradient(name):
    """Rows of different lengths: padded to one batch, or each cut to its own length and accumulated."""
    n, length = 8, 12
    sides = [(normal(k, n, length, 6), *batch(k, n, length, 9)) for k in (1, 2)]
    weight = normal(3, 9, 6).requires_grad_()
    reference = normal(4, 9, 6)

    def mean_loss(rows, width):
        figures = []
        for head in (weight, reference):
            for states, ids, mask, _ in sides:
                cut = (x[rows, :width] for x in (states, ids, mask))
                figures.append(sequence_logps(*cut, lambda x, head=head: x @ head.T))
        (c, len_c), (r, len_r), (ref_c, _), (ref_r, _) = figures
        return LOSSES[name](c, r, ref_c, ref_r, len_c, len_r).mean()

    at_once = mean_loss(slice(0, n), length)
    widths = [max(spans[k][1] for *_, spans in sides) for k in range(n)]
    one_by_one = sum(mean_loss(slice(k, k + 1), widths[k]) for k in range(n)) / n
    assert one_by_one.item() == pytest.approx(at_once.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (at_once, one_by_one)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
