"""Page 5, putting it together. Write the function, then: python -m pytest tutorials/exercises -k page_5"""


def consistency_loss(model, extractor, examples, config):
    """What λ multiplies: the MLC loss of a batch of translated prompts. Returns a scalar with its gradient.

    examples: a list of mlc_min.examples.Example, whose `prompts` are {language: token ids}, of the same languages each.
    config: has language_list, mlc_layer, mlc_tau and mlc_form. extractor: (…, hidden size) -> (…, d).
    Use mlc_min.last_token_states, mlc_min.mlc_loss and mlc_min.examples.pad, or your own of the pages before.
    """
    raise NotImplementedError
