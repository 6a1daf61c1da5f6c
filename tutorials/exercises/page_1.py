"""Page 1, the gap. Write the function, then: python -m pytest tutorials/exercises -k page_1"""


def safety_table(safe):
    """Rates and agreement of verdicts.

    safe: (requests, languages) of True or False: a list of lists, a NumPy array or a tensor.
    Returns {"rates": % safe of each language, "avg": their mean, "var": population variance of the rates as
    fractions, times 100, "pag": mean over requests and over pairs of languages of "the same verdict", None if there is
    one language only}.
    """
    raise NotImplementedError
