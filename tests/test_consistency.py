"""The consistency loss against NumPy in float64, closed forms, and the symmetries it promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlc_min.consistency import (
    FORMS,
    cosine_loss,
    make_extractor,
    mlc_ceiling,
    mlc_floor,
    mlc_loss,
    separation_loss,
    singular_values,
    unit_rows,
)
from mlc_min.evaluation.diagnose import collinearity, retrieval_accuracy, shuffle_groups
from mlc_min.machinery.centring import CentredByLanguage

both_forms = pytest.mark.parametrize("form", FORMS)
# Prompts, languages and dimensions; m > d, m = 1 and d = 1 are among them.
groups = given(n=st.integers(1, 3), m=st.integers(1, 6), d=st.integers(1, 8), seed=st.integers(0, 10**6))
close = {"rel": 1e-4, "abs": 1e-5}  # float32 against float64; the 1/τ in front of σ costs one digit


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(seed, d):
    return torch.linalg.qr(normal(seed, d, d, dtype=torch.float64)).Q


def numpy_unit_rows(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_loss(x, tau=0.2, form="official"):
    sigma = np.linalg.svd(numpy_unit_rows(x), compute_uv=False)
    scale = sigma[:, :1] * tau if form == "official" else tau
    return np.log(np.exp((sigma - sigma[:, :1]) / scale).sum(-1)).mean()


def numeric_gradient(f, x, step=1e-6):
    """Central differences of a NumPy function, one entry at a time."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


def gradient(x, **kwargs):
    x = x.detach().clone().requires_grad_()
    mlc_loss(x, **kwargs).backward()
    return x.grad


# --- the value ---


@both_forms
@groups
def test_loss_equals_numpy_in_float64(form, n, m, d, seed):
    """Usually rows were not divided by their lengths, or τ or the form is ignored, or a sum stands for the mean."""
    x = normal(seed, n, m, d)
    for tau in (0.05, 0.2, 1.0):
        assert mlc_loss(x.double(), tau, form).item() == pytest.approx(numpy_loss(x, tau, form), rel=1e-9, abs=1e-12)
        # σ is right to about 1e-6 in float32, and the loss divides it by τ.
        assert mlc_loss(x, tau, form).item() == pytest.approx(numpy_loss(x, tau, form), rel=1e-4, abs=2e-6 / tau)


@groups
def test_squared_singular_values_are_the_gram_eigenvalues_largest_first_and_sum_to_m(n, m, d, seed):
    z = numpy_unit_rows(normal(seed, n, m, d))
    gram = np.linalg.eigvalsh(z @ z.transpose(0, 2, 1))[:, ::-1][:, : min(m, d)]
    squares = singular_values(normal(seed, n, m, d).double()).square()
    np.testing.assert_allclose(squares, gram, atol=1e-12)
    np.testing.assert_allclose(squares.sum(-1), m, atol=1e-12)


@pytest.mark.parametrize(
    ("m", "d", "form", "floor"),
    [
        (4, 512, "official", 0.0200121),  # log(1 + 3 e^-5)
        (10, 512, "official", 0.0588739),  # log(1 + 9 e^-5)
        (10, 3, "official", 0.0133859),  # r = 3: log(1 + 2 e^-5)
        (4, 512, "paper", 1.361907e-4),  # log(1 + 3 e^-10)
        (9, 2, "paper", 3.059023e-7),  # r = 2: log(1 + e^-15)
        (1, 512, "official", 0.0),
        (1, 512, "paper", 0.0),
    ],
)
def test_floor_has_the_value_of_its_formula(m, d, form, floor):
    """Usually r is m and not min(m, d), or σ₁ = √m is missing in the paper's form."""
    assert mlc_floor(m, d, 0.2, form) == pytest.approx(floor, rel=1e-5)


@both_forms
@groups
def test_rows_on_one_line_reach_the_floor_whatever_their_signs_and_lengths(form, n, m, d, seed):
    """Usually the rows were not divided by their lengths, or zeros among σ were dropped."""
    line, factors = normal(seed, n, 1, d), normal(seed + 1, n, m, 1)
    x = line * (factors.sign() * (0.1 + factors.abs()))
    assert mlc_loss(x, form=form).item() == pytest.approx(mlc_floor(m, d, form=form), **close)
    assert mlc_loss(x.double(), form=form).item() == pytest.approx(mlc_floor(m, d, form=form), rel=1e-5, abs=1e-12)


@both_forms
@given(m=st.integers(1, 6), extra=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_orthogonal_rows_reach_the_ceiling_log_r(form, m, extra, seed):
    """Usually the softmax is not over all r singular values of one prompt."""
    x = orthogonal(seed, m + extra)[None, :m] * (0.1 + normal(seed, m, 1).abs())
    assert mlc_loss(x.float(), form=form).item() == pytest.approx(math.log(m), **close)
    assert mlc_ceiling(m, m + extra) == pytest.approx(math.log(m))


@both_forms
@given(d=st.integers(1, 5), bases=st.integers(2, 3), seed=st.integers(0, 10**6))
def test_more_languages_than_dimensions_reach_log_d_when_spread_evenly(form, d, bases, seed):
    """Several orthogonal bases on top of each other: ZᵀZ = bases · I, so all d singular values are equal."""
    x = torch.cat([orthogonal(seed + k, d) for k in range(bases)])[None].float()
    assert mlc_loss(x, form=form).item() == pytest.approx(math.log(d), **close)
    assert mlc_ceiling(bases * d, d) == pytest.approx(math.log(d))


@both_forms
@groups
def test_loss_lies_between_floor_and_ceiling(form, n, m, d, seed):
    """Usually the sign is wrong, or τ multiplies where it should divide."""
    loss = mlc_loss(normal(seed, n, m, d, dtype=torch.float64), form=form).item()
    assert mlc_floor(m, d, form=form) - 1e-9 <= loss <= mlc_ceiling(m, d) + 1e-9


@groups
def test_official_form_is_the_paper_form_at_temperature_sigma_1_tau_of_each_group(n, m, d, seed):
    x = normal(seed, n, m, d, dtype=torch.float64)
    paper = [mlc_loss(x[k : k + 1], 0.2 * singular_values(x)[k, 0].item(), "paper").item() for k in range(n)]
    assert mlc_loss(x, 0.2, "official").item() == pytest.approx(np.mean(paper), rel=1e-9, abs=1e-12)


@both_forms
@given(m=st.integers(2, 6), d=st.integers(2, 8), seed=st.integers(0, 10**6), step=st.floats(0, 10))
def test_moving_a_row_towards_the_leading_direction_never_raises_the_loss(form, m, d, seed, step):
    """True for steps of any size. The row's share along v₁ grows, so σ₁ >= ‖Z v₁‖ grows; the rest of the row
    shrinks by one factor, so the singular values of Z (I - v₁ v₁ᵀ), which bound σ₂, σ₃, … (Weyl), shrink."""
    z = numpy_unit_rows(normal(seed, 1, m, d))
    leading = np.linalg.svd(z[0])[2][0]
    for row in range(m):
        moved = z.copy()
        moved[0, row] += step * leading * np.copysign(1, z[0, row] @ leading)
        before, after = (mlc_loss(torch.from_numpy(a), form=form).item() for a in (z, moved))
        assert after <= before + 1e-12


# --- the symmetries ---


@both_forms
@groups
def test_loss_is_unchanged_by_the_order_of_languages(form, n, m, d, seed):
    """Usually the first language is treated apart; the loss has no anchor."""
    x = normal(seed, n, m, d)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert mlc_loss(x[:, order], form=form).item() == pytest.approx(mlc_loss(x, form=form).item(), **close)


@both_forms
@groups
def test_loss_is_unchanged_by_a_rotation_of_the_space(form, n, m, d, seed):
    """Usually entries of the rows are used beside their singular values."""
    x = normal(seed, n, m, d)
    turned = (x.double() @ orthogonal(seed + 1, d)).float()
    assert mlc_loss(turned, form=form).item() == pytest.approx(mlc_loss(x, form=form).item(), **close)


@both_forms
@groups
def test_loss_is_unchanged_by_a_sign_flip_of_any_row(form, n, m, d, seed):
    """Usually cosines or a mean row are used in place of singular values."""
    x = normal(seed, n, m, d)
    flipped = x * normal(seed + 1, n, m, 1).sign()
    assert mlc_loss(flipped, form=form).item() == pytest.approx(mlc_loss(x, form=form).item(), **close)


@both_forms
@groups
def test_a_positive_factor_per_row_leaves_the_loss_and_divides_the_gradient(form, n, m, d, seed):
    """Factors from 1e-25 to 1e25, whose squares float32 cannot hold: divide each row by its largest entry first."""
    exponents = 50 * torch.rand(n, m, 1, generator=torch.Generator().manual_seed(seed)) - 25
    exponents[0, 0], exponents[-1, -1] = -25, 25
    factors, x = 10**exponents, normal(seed, n, m, d)
    scaled = factors * x
    assert mlc_loss(scaled, form=form).item() == pytest.approx(mlc_loss(x, form=form).item(), **close)
    # Ties of the singular values make the gradient ambiguous; with m <= d random rows have none.
    if m <= d and d > 1:
        exact = gradient(scaled.double(), form=form) * factors.double()
        np.testing.assert_allclose(gradient(scaled, form=form) * factors, exact, atol=1e-3 * exact.abs().max() + 1e-5)


# --- the gradient ---


@both_forms
@pytest.mark.parametrize("function", ["mlc", "cosine"])
def test_one_language_gives_zero_with_zero_gradient(form, function):
    x = normal(0, 3, 1, 5).requires_grad_()
    loss = mlc_loss(x, form=form) if function == "mlc" else cosine_loss(x)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(3, 1, 5))


A, B = numpy_unit_rows(normal(7, 2, 5))
SPECIAL = {
    "repeated rows": [A, A, B, B],
    "identical rows": [A] * 4,
    "identical rows, m > d": [A] * 7,
    "antipodal rows": [A, -A, A, -A],
    "orthogonal rows": np.eye(5)[:4],
    "all directions twice, m > d": np.concatenate([np.eye(5), -np.eye(5)]),
    "nearly identical rows": A + 1e-7 * normal(8, 4, 5).numpy(),
    "random rows": normal(9, 4, 5).numpy(),
}


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SPECIAL)
def test_gradient_is_bounded_and_tangent_to_the_sphere_even_where_singular_values_tie(case, dtype, form):
    """Usually the part along the row was not taken away, as the division by its length does; or the gradient goes
    through U or V. The bound: ‖∂L/∂σ‖ = ‖softmax - e₁‖ / τ <= √2 / τ (official: / σ₁, which is >= 1)."""
    z = torch.from_numpy(numpy_unit_rows(SPECIAL[case]))[None].to(dtype)
    g = gradient(z, form=form)
    assert g.norm() <= math.sqrt(2) / 0.2
    np.testing.assert_allclose((g * z).sum(-1), 0, atol=1e-6)
    assert mlc_loss(z, form=form).item() == pytest.approx(numpy_loss(z, form=form), **close)


@both_forms
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_float32_gradient_holds_for_nearly_identical_rows(spread, form):
    """Eigenvalues of the Gram matrix would be off by 0.84 at a spread of 1e-4."""
    x = normal(0, 1, 1, 512) + spread * normal(1, 1, 10, 512)
    exact = gradient(x.double(), form=form)
    assert ((gradient(x, form=form) - exact).norm() / exact.norm()).item() < 5e-3


@pytest.mark.parametrize("function", [lambda x: mlc_loss(x, form="paper"), cosine_loss])
@pytest.mark.parametrize(("m", "d"), [(3, 5), (5, 3), (4, 4)])
def test_gradient_of_the_paper_form_and_of_the_cosine_loss_passes_gradcheck(m, d, function):
    assert torch.autograd.gradcheck(function, normal(m, 2, m, d, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize(("m", "d"), [(3, 5), (5, 3)])
def test_official_gradient_treats_sigma_1_in_the_denominator_as_a_constant(m, d):
    """Usually `.detach()` is missing: σ₁ in the denominator is a number without a gradient. If the gradient was written
    by hand, it may also be τ, σ₁ or the rows' lengths that nothing is divided by."""
    x = normal(m, 1, m, d, dtype=torch.float64)
    constant = 0.2 * np.linalg.svd(numpy_unit_rows(x), compute_uv=False)[0, 0]
    official = gradient(x, form="official").numpy()
    np.testing.assert_allclose(official, numeric_gradient(lambda a: numpy_loss(a, constant, "paper"), x.numpy()), 1e-6)
    without_stop = numeric_gradient(lambda a: numpy_loss(a, 0.2, "official"), x.numpy())
    assert np.abs(official - without_stop).max() > 0.05 * np.abs(official).max()


# --- precision ---


@pytest.mark.parametrize("function", [mlc_loss, cosine_loss, lambda x: mlc_loss(x, form="paper"), collinearity])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_float32(function, dtype):
    x = normal(3, 2, 5, 16).to(dtype)
    expected = function(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = function(x)
    assert expected.dtype == torch.float32
    for result in (function(x), inside):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_float64_stays_float64():
    """Usually every input is made float32."""
    x = normal(3, 2, 5, 16, dtype=torch.float64)
    np.testing.assert_allclose(unit_rows(x), numpy_unit_rows(x), rtol=1e-14)
    assert mlc_loss(x).dtype == cosine_loss(x).dtype == torch.float64


# --- errors ---


@pytest.mark.parametrize("function", [mlc_loss, cosine_loss, collinearity, retrieval_accuracy])
@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "prompt 1, language 2"), (math.nan, "NaN or infinity"), (math.inf, "NaN or inf"), (-math.inf, "NaN or inf")],
)
def test_rows_without_a_direction_are_refused(function, value, message):
    x = normal(0, 3, 4, 5)
    x[1, 2] = value
    with pytest.raises(ValueError, match=message):
        function(x)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (1, 3, 4, 5), (0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_wrong_or_empty_shapes_are_refused_and_shown(shape):
    """Usually a shape with a 0 gives NaN silently; the message has to show the shape."""
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        mlc_loss(torch.ones(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"tau": 0.0}, "tau"), ({"tau": -0.2}, "tau"), ({"tau": math.nan}, "tau"), ({"form": "other"}, "other")],
)
def test_wrong_settings_are_refused_by_name(kwargs, message):
    """Usually NaN passes `tau <= 0`, which is False for it: ask `not tau > 0`."""
    with pytest.raises(ValueError, match=message):
        mlc_loss(normal(0, 2, 3, 4), **kwargs)


# --- the ablation and the figures ---


@given(n=st.integers(1, 3), m=st.integers(2, 6), d=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_cosine_loss_equals_a_loop_over_pairs(n, m, d, seed):
    x = normal(seed, n, m, d)
    pairs = [a[i] @ a[j] for a in numpy_unit_rows(x) for i in range(m) for j in range(i)]
    assert cosine_loss(x).item() == pytest.approx(1 - np.mean(pairs), abs=1e-5)


def test_opposite_rows_are_wrong_for_the_cosine_loss_and_aligned_for_mlc():
    x = torch.tensor([[[1.0, 2.0], [-3.0, -6.0]]])
    assert cosine_loss(x).item() == pytest.approx(2)
    assert mlc_loss(x).item() == pytest.approx(mlc_floor(2, 2))


@given(n=st.integers(1, 5), m=st.integers(1, 4), d=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_separation_is_the_cross_entropy_of_finding_the_own_prompt_by_its_direction(n, m, d, seed):
    x = normal(seed, n, m, d)
    mean = numpy_unit_rows(numpy_unit_rows(x).mean(1))
    expected = 0.0
    for i in range(n):
        similarity = np.array([mean[i] @ mean[k] for k in range(n)]) / 0.3
        expected += np.log(np.exp(similarity).sum()) - similarity[i]
    assert separation_loss(x, 0.3).item() == pytest.approx(expected / n, **close)


def test_separation_ends_the_trick_of_one_vector_added_to_all_states():
    x, common = normal(0, 4, 3, 8), 100 * normal(1, 1, 1, 8)
    assert mlc_loss(x + common) < mlc_loss(x)
    assert separation_loss(x + common).item() == pytest.approx(math.log(4), abs=1e-2)
    assert separation_loss(x).item() < 0.5


@pytest.mark.parametrize("kind", ["batch", "running"])
def test_a_vector_added_to_all_states_of_a_language_changes_nothing_once_they_are_centred(kind):
    x, common = normal(0, 5, 3, 8), 10 * normal(1, 1, 3, 8)
    own, shifted = (CentredByLanguage(torch.nn.Identity(), kind, 3, 8) for _ in range(2))
    for _ in range(3):
        assert torch.allclose(own(x), shifted(x + common), atol=1e-4)
    assert torch.allclose(own(x).mean(0), torch.zeros(3, 8), atol=1e-5)


def test_the_running_mean_is_of_all_batches_and_then_a_tenth_of_the_newest_and_stands_still_without_gradients():
    module, mean = CentredByLanguage(torch.nn.Identity(), "running", 2, 3), np.zeros((2, 3))
    for k in range(1, 15):
        x = normal(k, 4, 2, 3)
        mean += max(1 / k, 0.1) * (x.numpy().mean(0) - mean)
        assert np.allclose(module(x).numpy(), x.numpy() - mean, atol=1e-5)
    with torch.no_grad():
        module(normal(99, 4, 2, 3))
    assert np.allclose(module.mean.numpy(), mean, atol=1e-5)
    with pytest.raises(ValueError, match="needs all 2 languages"):
        module(normal(0, 4, 3, 3))


def test_no_gradient_goes_through_the_means():
    x = normal(0, 4, 2, 3).requires_grad_()
    (CentredByLanguage(torch.nn.Identity(), "batch", 2, 3)(x) * normal(1, 4, 2, 3)).sum().backward()
    assert torch.allclose(x.grad, normal(1, 4, 2, 3))


@groups
def test_one_minus_collinearity_is_the_relative_error_of_the_best_rank_1_approximation(n, m, d, seed):
    """Usually σ₁ is not squared, or not divided by m, or the result still carries a gradient."""
    x = normal(seed, n, m, d)
    assert not collinearity(x.clone().requires_grad_()).requires_grad
    z = numpy_unit_rows(x)
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    best = u[:, :, :1] * s[:, None, :1] @ vt[:, :1]
    error = ((z - best) ** 2).sum((1, 2)) / (z**2).sum((1, 2))
    np.testing.assert_allclose(1 - collinearity(x), error, atol=1e-5)


def test_retrieval_accuracy_by_hand():
    """Usually the dot product is used, which long rows win: divide each row by its length."""
    english = [[10.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    other = [[2.0, 1.0], [1.0, 2.0], [1.0, -0.1]]  # right; right by cosine, wrong by dot product; wrong
    wrong = [[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]
    x = torch.tensor([english, other, wrong]).transpose(0, 1)
    assert retrieval_accuracy(x).tolist() == pytest.approx([1, 2 / 3, 0])


def test_shuffle_moves_language_j_of_prompt_n_to_prompt_n_plus_j():
    """Usually the move goes the other way, or wraps at m and not at N."""
    x = torch.tensor([[0, 1, 2], [10, 11, 12], [20, 21, 22]])[..., None]  # 10 · prompt + language
    assert shuffle_groups(x)[..., 0].tolist() == [[0, 21, 12], [10, 1, 22], [20, 11, 2]]


@given(m=st.integers(1, 6), more=st.integers(0, 4))
def test_shuffled_groups_never_hold_two_rows_of_one_prompt_and_lose_no_row(m, more):
    """Usually a language left its column, or two languages moved by the same number."""
    n = m + more
    x = torch.cartesian_prod(torch.arange(n), torch.arange(m)).view(n, m, 2)  # (prompt, language)
    shuffled = shuffle_groups(x)
    assert all(len(set(prompts)) == m for prompts in shuffled[..., 0].tolist())
    assert torch.equal(shuffled[..., 1], x[..., 1])  # each language stays in its column
    assert sorted(shuffled.view(-1, 2).tolist()) == x.view(-1, 2).tolist()


# --- the extractor ---


@pytest.mark.parametrize(("kind", "trainable"), [("learned", {"weight", "bias"}), ("frozen", set())])
def test_extractor_is_w_h_plus_b_and_frozen_is_the_same_map_without_training(kind, trainable):
    torch.manual_seed(0)
    reference = torch.nn.Linear(6, 4)
    torch.manual_seed(0)
    extractor = make_extractor(kind, 6, 4)
    h = normal(0, 2, 3, 6)
    expected = h.numpy() @ reference.weight.detach().numpy().T + reference.bias.detach().numpy()
    np.testing.assert_allclose(extractor(h).detach(), expected, atol=1e-6)
    assert {name for name, p in extractor.named_parameters() if p.requires_grad} == trainable


def test_identity_extractor_returns_the_hidden_state_and_other_kinds_are_refused():
    h = normal(0, 2, 3, 6)
    assert torch.equal(make_extractor("identity", 6, 4)(h), h)
    with pytest.raises(ValueError, match="'random'"):
        make_extractor("random", 6, 4)


def test_a_learned_extractor_alone_lowers_the_loss_of_unrelated_prompts_to_near_the_floor():
    """A negative result of the method: a low loss does not show that the model's states agree."""
    torch.manual_seed(0)
    hidden, extractor = normal(0, 8, 4, 32), make_extractor("learned", 32, 16)
    optimizer = torch.optim.Adam(extractor.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = mlc_loss(extractor(hidden))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    floor, ceiling = mlc_floor(4, 16), mlc_ceiling(4, 16)
    assert losses[0] > floor + 0.2 * (ceiling - floor)
    assert losses[-1] < floor + 0.01 * (ceiling - floor)
    assert collinearity(extractor(hidden)).min() > 0.95 > collinearity(hidden).max()
