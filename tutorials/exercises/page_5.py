"""Page 5, putting it together: part A is checked by
`python -m pytest tutorials/exercises -k page_5a`, part B by `page_5b`.
"""


def consistency_loss(model, extractor, examples, config):
    """What λ multiplies: the MLC loss of a batch of translated prompts. Returns a scalar with its gradient.

    examples: a list of mlc_min.examples.Example, whose `prompts` are {language: token ids}.
    config: has language_list, mlc_layer, mlc_tau and mlc_form. extractor: (…, hidden size) -> (…, d).
    Use mlc_min.last_token_states, mlc_min.mlc_loss and mlc_min.examples.pad, or your own of the pages before.
    A: every example has a prompt in every language of language_list. The result is the mean over examples.
    B: some lack a few languages; each is compared in those that it has. One in a single language adds 0 to the mean,
    and a batch with nothing but such rows is 0.
    """
    raise NotImplementedError
