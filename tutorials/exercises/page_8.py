"""Page 8, the whole method: part A is checked by
`python -m pytest tutorials/exercises -k page_8a`, part B by `page_8b`.
"""

# Your own of the pages before, as far as you want to use them:
#     from page_1 import safety_table
#     from page_2 import last_token_states
#     from page_3 import mlc_loss
#     from page_4 import dpo_loss, sequence_logps, sft_loss
#     from page_5 import consistency_loss


def training(model, examples, recipe):
    """Align `model` in place: a generator that takes one step at a time and yields its loss, a float.

    examples: a list of mlc_min.examples.Example: `prompts`, {language: token ids}, and `chosen` and `rejected`, token
    ids in the first language. recipe: a TrainConfig; the page lists the settings that you need.
    """
    raise NotImplementedError


def evaluation(model, tokenizer, prompts, refusals):
    """The table of page 1: what `safety_table` gives for "the greedy reply is, to the letter, one of `refusals`".

    prompts: for each request a list of its token ids in each language, which end where the reply begins.
    refusals: a set of texts, the refusal in every language.
    """
    raise NotImplementedError
