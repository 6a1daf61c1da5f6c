"""Page 3, collinearity as a loss. Write the functions, then: python -m pytest tutorials/exercises -k page_3"""


def mlc_loss(representations, tau=0.2, form="official"):
    """The Multi-Lingual Consistency loss. (N prompts, m languages, d), any float dtype -> scalar.

    Divide rows by their length, take singular values σ, and return the mean over prompts of -log softmax(s / τ)₁, with
    s = σ ("paper") or s = σ / σ₁, without a gradient through this division ("official").
    Half precision and autocast compute in float32, float64 stays. Raises ValueError for a shape other than three
    dimensions, none of them 0; for tau <= 0 or NaN and an unknown form, named in the message; for NaN or infinity ("NaN
    or infinity"); and for a row of zeros, naming its "prompt 1, language 2".
    """
    raise NotImplementedError


def mlc_floor(languages, dim, tau=0.2, form="official"):
    """The loss where all rows lie on one line."""
    raise NotImplementedError


def mlc_ceiling(languages, dim):
    """The loss where all min(languages, dim) singular values are equal."""
    raise NotImplementedError
