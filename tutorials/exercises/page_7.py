"""Page 7, a port. Write the functions, then: python -m pytest tutorials/exercises -k page_7"""


def mlc_loss(representations, tau=0.2, form="official"):
    """The loss of page 3 in NumPy, float64: (N, m, d) array -> float. The same errors."""
    raise NotImplementedError


def mlc_loss_gradient(representations, tau=0.2, form="official"):
    """Its gradient: (N, m, d) array -> (N, m, d) array. In the official form σ₁ in the denominator is a constant."""
    raise NotImplementedError
