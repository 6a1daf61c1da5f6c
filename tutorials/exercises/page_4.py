"""Page 4, DPO and SFT by hand: part A is checked by
`python -m pytest tutorials/exercises -k page_4a`, part B by `page_4b`.
"""


def sequence_logps(states, input_ids, response_mask, head=None):
    """Summed log-probability of each response and its length in tokens: (N,) float32, (N,) int64.

    A: states are (N, T, V) logits. input_ids: (N, T). response_mask: (N, T) bool, True on the response's tokens.
    B: with `head`, states are (N, T, hidden size) and head maps them to logits; it is to be run only where a response
    token is predicted. Logits in half precision are made float32 first. What stands beside a response changes no digit.
    Raises ValueError for a row without response ("row 2 …") and for a response at position 0 ("position 0").
    """
    raise NotImplementedError


def sft_loss(policy_chosen_logps, chosen_lengths):
    """Cross-entropy per token of the chosen responses: (N,), (N,) -> (N,)."""
    raise NotImplementedError


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    """-log sigmoid(β · ((chosen - its reference) - (rejected - its reference))). All (N,) sums -> (N,).

    Use a function that stays finite at large margins. B tries some of thousands.
    """
    raise NotImplementedError
