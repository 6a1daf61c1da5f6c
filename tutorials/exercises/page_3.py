"""Page 3, collinearity as a loss: part A is checked by
`python -m pytest tutorials/exercises -k page_3a`, part B by `page_3b`.
"""


def mlc_loss(representations, tau=0.2, form="official"):
    """The Multi-Lingual Consistency loss. (N prompts, m languages, d), float -> scalar.

    A: divide rows by their length, take singular values σ, and return the mean over prompts of -log softmax(s / τ)₁,
    with s = σ ("paper") or s = σ / σ₁, without a gradient through this division ("official").
    B: half precision and autocast compute in float32, float64 stays; rows may be from 1e-25 to 1e25 long. Raises
    ValueError for a shape other than three dimensions, none of them 0; for tau <= 0 or NaN and an unknown form, named
    in the message; for NaN or infinity ("NaN or infinity"); and for a row of zeros, naming its "prompt 1, language 2".
    """
    raise NotImplementedError


def mlc_floor(languages, dim, tau=0.2, form="official"):
    """The loss where all rows lie on one line."""
    raise NotImplementedError


def mlc_ceiling(languages, dim):
    """The loss where all min(languages, dim) singular values are equal."""
    raise NotImplementedError
