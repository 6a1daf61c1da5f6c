"""Page 2, representations: part A is checked by
`python -m pytest tutorials/exercises -k page_2a`, part B by `page_2b`.
"""


def last_position(attention_mask):
    """Index of each row's last real token, whichever side the padding is on. (N, T) of 0 and 1 -> (N,) int64.

    B: raises ValueError "an empty prompt has no last token" for a row without any real token.
    """
    raise NotImplementedError


def last_token_states(model, input_ids, attention_mask, layer=-1):
    """Hidden state of each row's last real token at entry `layer` of transformers' `hidden_states`.

    (N, T), (N, T) -> (N, hidden size). The padding, on either side, must not change the result.
    B: runs no layer above the entry, no final norm unless it is the last entry, and not the vocabulary head; leaves no
    hook behind, after an exception neither. The layers are `model.get_decoder().layers`.
    """
    raise NotImplementedError


def retrieval_accuracy(representations):
    """Share of prompts whose nearest English state, by cosine, is their own translation.

    (N prompts, m languages, d) -> (m,). Language 0 is English; entry 0 of the result compares it with itself.
    """
    raise NotImplementedError
