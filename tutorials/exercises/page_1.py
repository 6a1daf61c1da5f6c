"""Page 1, the gap: part A is checked by `python -m pytest tutorials/exercises -k page_1a`, part B by `page_1b`."""


def safety_table(safe):
    """Rates and agreement of verdicts.

    safe: (requests, languages) of True or False: a list of lists, a NumPy array or a tensor.
    Returns {"rates": % safe of each language, "avg": their mean, "var": population variance of the rates as
    fractions, times 100, "pag": mean over requests and over pairs of languages of "the same verdict"}.
    B: any of the three kinds of table gives the same result; "pag" is None if there is one language only; ValueError
    that starts with "safe must be" for no request, no language, or another number of dimensions than two.
    """
    raise NotImplementedError
