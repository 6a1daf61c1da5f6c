"""The alignment losses of the paper, written out: SFT, DPO, SimPO, ORPO.

`sequence_logps` makes log-probabilities from a model's output; the losses take vectors (N,) of them, one entry per
prompt, and give vectors (N,), so that the caller decides how to average.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, without waiting for what a GPU still does where that is safe: CUDA first copies what lies in
    ordinary memory, Apple's GPU would read it later."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def sequence_logps(
    states: Tensor, input_ids: Tensor, response_mask: Tensor, head: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each response, and its length in tokens.

    states: (N, T, V) logits, or (N, T, d_h) last hidden states together with `head`, the map to logits. input_ids:
    (N, T) int64. response_mask: (N, T) bool, True at the tokens of the response, the end token included, and nowhere
    else. Returns (N,) float32 sums of log p(token t | tokens before t) over the response tokens, and (N,) int64 counts.

    Give hidden states and a head where the vocabulary is large: the head then runs on the positions that predict a
    response token only, never on prompts or padding.
    Raises ValueError if a row has no response token, or one at position 0, which nothing predicts."""
    mask = response_mask.cpu().numpy()  # on the CPU, so that nothing waits for a GPU if it lies there
    if mask[:, 0].any():
        raise ValueError("a response cannot start at position 0: no token before it predicts it")
    lengths = mask.sum(-1)
    if (lengths == 0).any():
        raise ValueError(f"row {(lengths == 0).argmax()} of the batch has an empty response")
    # The shift by one: the state at position t - 1 predicts token t.
    rows, before = (to_device(torch.from_numpy(index), states.device) for index in mask[:, 1:].nonzero())
    logits = states[rows, before]  # (tokens, V or d_h)
    if head is not None:
        logits = head(logits)
    # float32 before the softmax: over a long response bfloat16 is wrong by whole nats.
    logps = torch.log_softmax(logits.float(), -1).gather(-1, input_ids.to(states.device)[rows, before + 1][:, None])
    sums = logps.new_zeros(len(input_ids)).index_add(0, rows, logps[:, 0])
    return sums, to_device(torch.from_numpy(lengths), states.device)


def sft_loss(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Cross-entropy per token of the chosen response: (N,), (N,) -> (N,). Each row weighs the same, whatever its
    length, so that the mean over rows does not depend on the batches."""
    return -policy_chosen_logps / chosen_lengths


def dpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor, beta: float = 0.1,
) -> Tensor:  # fmt: skip
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(β · margin). All (N,) summed log-probs -> (N,).
    margin = (policy - reference) of the chosen minus (policy - reference) of the rejected response.
    log 2 = 0.6931 where policy and reference agree."""
    chosen, rejected = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (chosen - rejected))


def simpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    beta: float = 2.0, gamma: float = 1.0,
) -> Tensor:  # fmt: skip
    """SimPO (Meng et al. 2024, eq. 6): no reference, log-probs per token, target margin γ. All (N,) -> (N,)."""
    margin = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * margin - gamma)


def orpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor,
    beta: float = 0.1,
) -> Tensor:  # fmt: skip
    """ORPO (Hong et al. 2024, eq. 6-7): SFT loss minus β · log sigmoid(log odds ratio). All (N,) -> (N,).
    odds(p) = p / (1 - p) with p = exp(mean log-prob per token)."""
    chosen, rejected = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    log_odds_ratio = (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite with finite gradient everywhere.

    `log1p(-exp(x))`, as the official code has it, is -inf at 0 and rounds to it just below 0 in float32;
    `log(-expm1(x))` keeps all digits there. A certain response, x = 0, counts as p = 1 - 1e-6."""
    return torch.log(-torch.expm1(x.clamp(max=-1e-6)))
