"""Page 6, believing it: part A is checked by
`python -m pytest tutorials/exercises -k page_6a`, part B by `page_6b`.
"""


def collinearity(representations):
    """σ₁²/m of each prompt's rows, divided by their lengths, without gradient. (N, m, d), float -> (N,).

    B: half precision and autocast compute in float32. Raises ValueError for NaN or infinity ("NaN or infinity"), and
    for a row of zeros, naming its "prompt 1, language 2".
    """
    raise NotImplementedError


def shuffle_groups(representations):
    """Language j of prompt n goes to prompt n + j (mod N). (N, m, d) -> (N, m, d)."""
    raise NotImplementedError


def wilson(part, whole):
    """(low, high), in percent: the 95 % interval of the rate part / whole, with z = 1.959964.

    B: neither end below 0 or above 100 by the last digit either; None for whole = 0.
    """
    raise NotImplementedError
