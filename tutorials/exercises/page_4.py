"""Page 4, DPO and SFT by hand. Write the functions, then: python -m pytest tutorials/exercises -k page_4"""


def sequence_logps(states, input_ids, response_mask, head=None):
    """Summed log-probability of each response and its length in tokens: (N,) float32, (N,) int64.

    states: (N, T, V) logits, or (N, T, hidden size) with `head`, the map to logits, to be run only where it is needed.
    input_ids: (N, T). response_mask: (N, T) bool, True on the response's tokens.
    Raises ValueError for a row without response ("row 2 …") and for a response at position 0 ("position 0").
    """
    raise NotImplementedError


def sft_loss(policy_chosen_logps, chosen_lengths):
    """Cross-entropy per token of the chosen responses: (N,), (N,) -> (N,)."""
    raise NotImplementedError


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    """-log sigmoid(β · ((chosen - its reference) - (rejected - its reference))). All (N,) sums -> (N,)."""
    raise NotImplementedError
