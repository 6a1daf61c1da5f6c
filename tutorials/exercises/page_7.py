"""Page 7, a port: part A is checked by
`python -m pytest tutorials/exercises -k page_7a`, part B by `page_7b`.
"""


def mlc_loss(representations, tau=0.2, form="official"):
    """The loss of page 3 in NumPy, float64: (N, m, d) array -> float.

    B: rows that lie on one line but for the last digits; logits of a thousand; the errors of page 3.
    """
    raise NotImplementedError


def mlc_loss_gradient(representations, tau=0.2, form="official"):
    """Its gradient: (N, m, d) array -> (N, m, d) array. In the official form σ₁ in the denominator is a constant."""
    raise NotImplementedError
