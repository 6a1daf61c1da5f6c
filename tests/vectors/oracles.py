"""The other functions in NumPy, float64, with their gradients: {input: gradient of the sum over rows}.

Written from the formulas, with no line of the PyTorch code, so that a shared mistake is unlikely. `mlc_loss` is in
numpy_loss.py. Shapes: N prompts, m languages, d dimensions, T tokens, V vocabulary entries; losses and
log-probabilities of responses are (N,), as in preference.py.
"""

import itertools

import numpy as np

from mlc_min.ports.numpy_loss import through_unit_rows, unit_rows


def cosine_loss(representations):
    """1 - mean cosine over the pairs of languages: (N, m, d) -> scalar; 0 for m = 1."""
    m = representations.shape[1]
    pairs = list(itertools.combinations(range(m), 2))
    if not pairs:
        return 0.0
    return 1 - np.mean([z[i] @ z[j] for z in unit_rows(representations) for i, j in pairs])


def cosine_loss_gradient(representations):
    n, m, _ = representations.shape
    if m == 1:
        return {"representations": np.zeros_like(representations)}
    z = unit_rows(representations)
    others = z.sum(1, keepdims=True) - z
    return {"representations": through_unit_rows(representations, -2 * others / (n * m * (m - 1)))}


def sequence_logps(states, input_ids, response_mask):
    """Logits (N, T, V), token ids and mask (N, T) -> sums of log-probabilities (N,), numbers of tokens (N,)."""
    sums = np.zeros(len(input_ids))
    for row, t in np.argwhere(response_mask):
        logits = states[row, t - 1] - states[row, t - 1].max()
        sums[row] += logits[input_ids[row, t]] - np.log(np.exp(logits).sum())
    return {"sums": sums, "lengths": response_mask.sum(-1)}


def sequence_logps_gradient(states, input_ids, response_mask):
    by_states = np.zeros_like(states)
    for row, t in np.argwhere(response_mask):
        odds = np.exp(states[row, t - 1] - states[row, t - 1].max())
        by_states[row, t - 1] = -odds / odds.sum()
        by_states[row, t - 1, input_ids[row, t]] += 1
    return {"states": by_states}


def sft_loss(policy_chosen_logps, chosen_lengths):
    return -policy_chosen_logps / chosen_lengths


def sft_loss_gradient(policy_chosen_logps, chosen_lengths):
    return {"policy_chosen_logps": -1 / chosen_lengths}


def softplus(x):
    """log(1 + exp(x)) = -log sigmoid(-x), without overflow."""
    return np.logaddexp(0, x)


def sigmoid(x):
    return np.exp(-softplus(-x))


def dpo_margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    return (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)


def dpo_loss(*, beta, **logps):
    return softplus(-beta * dpo_margin(**logps))


def dpo_loss_gradient(*, beta, **logps):
    push = beta * sigmoid(-beta * dpo_margin(**logps))
    return {"policy_chosen_logps": -push, "policy_rejected_logps": push}


def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    return softplus(gamma - beta * (policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths))


def simpo_loss_gradient(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    margin = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    push = beta * sigmoid(gamma - beta * margin)
    return {"policy_chosen_logps": -push / chosen_lengths, "policy_rejected_logps": push / rejected_lengths}


CERTAIN = -1e-6  # ORPO: a mean log-probability above this counts as this in 1 - p, which would be 0 at p = 1


def log_odds(x):
    """log(p / (1 - p)) of p = exp(x)."""
    return x - np.log(-np.expm1(np.minimum(x, CERTAIN)))


def log_odds_slope(x):
    """d log_odds / dx = 1 / (1 - p), or 1 where p counts as certain, for 1 - p is then a constant."""
    return np.where(x < CERTAIN, -1 / np.expm1(np.minimum(x, CERTAIN)), 1.0)


def orpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta):
    chosen, rejected = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    return -chosen + beta * softplus(log_odds(rejected) - log_odds(chosen))


def orpo_loss_gradient(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta):
    chosen, rejected = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    push = beta * sigmoid(log_odds(rejected) - log_odds(chosen))
    return {
        "policy_chosen_logps": (-1 - push * log_odds_slope(chosen)) / chosen_lengths,
        "policy_rejected_logps": push * log_odds_slope(rejected) / rejected_lengths,
    }


def safety_table(safe):
    """safe: lists (prompts, languages) of True, False, or None where there is no verdict. Rates in percent."""
    rates = []
    for verdicts in zip(*safe, strict=True):
        known = [verdict for verdict in verdicts if verdict is not None]
        rates.append(100 * sum(known) / len(known) if known else None)
    agreements = []
    for verdicts in safe:
        pairs = list(itertools.combinations([verdict for verdict in verdicts if verdict is not None], 2))
        if pairs:
            agreements.append(sum(a == b for a, b in pairs) / len(pairs))
    complete = None not in rates
    average = sum(rates) / len(rates) if complete else None
    return {
        "rates": rates,
        "avg": average,
        "var": sum((rate / 100 - average / 100) ** 2 for rate in rates) / len(rates) * 100 if complete else None,
        "pag": sum(agreements) / len(agreements) if agreements else None,
    }
