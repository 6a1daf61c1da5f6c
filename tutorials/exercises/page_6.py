"""Page 6, believing it. Write the functions, then: python -m pytest tutorials/exercises -k page_6"""


def collinearity(representations):
    """σ₁²/m of each prompt's rows, divided by their lengths, without gradient. (N, m, d) any float dtype -> (N,).

    Raises ValueError for NaN or infinity, and for a row of zeros, naming its "prompt 1, language 2".
    """
    raise NotImplementedError


def shuffle_groups(representations):
    """Language j of prompt n goes to prompt n + j (mod N). (N, m, d) -> (N, m, d)."""
    raise NotImplementedError


def wilson(part, whole):
    """(low, high), in percent: the 95 % interval of the rate part / whole, with z = 1.959964; None for whole = 0."""
    raise NotImplementedError
