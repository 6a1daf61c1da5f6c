"""The method: a linear extractor and the Multi-Lingual Consistency (MLC) loss.

For one prompt in m languages, stack the m representations as unit rows of Z (m x d). The rows say the same thing, up to
sign, exactly when Z has rank 1, that is when all singular values but the first are 0. The loss is the cross-entropy of
"the first singular value is the large one". All of this is pure functions of tensors.
Shapes: N prompts (groups), m languages, d_h hidden size, d representation size, r = min(m, d).
"""

import math

import torch
from torch import nn

FORMS = ("official", "paper")
TINY = 1e-30  # rows and temperatures below this overflow in float32; smaller values are certainly a mistake


class BrokenDown(ValueError):
    """Numbers that no training can go on with: NaN, infinity, or a representation of zeros."""


def make_extractor(kind: str, hidden_size: int, dim: int) -> nn.Module:
    """The map from hidden states (…, d_h) to representations (…, d): r = W h + b (paper, section 3).

    kind: "learned" (trained with the model, as in the paper), "frozen" (the same random map, never trained) or
    "identity" (the hidden state itself; `dim` is ignored). A learned extractor can lower the loss without the model
    moving at all, so the other two are there to check against it. Raises ValueError for another kind."""
    if kind == "identity":
        return nn.Identity()
    if kind not in ("learned", "frozen"):
        raise ValueError(f"extractor must be learned, frozen or identity, got {kind!r}")
    return nn.Linear(hidden_size, dim).requires_grad_(kind == "learned")


def unit_rows(representations: torch.Tensor) -> torch.Tensor:
    """Divide each row by its length: (N, m, d) any float dtype -> (N, m, d) float32 (float64 stays).

    Raises ValueError for a wrong shape or an empty dimension; BrokenDown, which is one too, for a NaN or infinity, or a
    row of zeros (no entry above 1e-30): it has no direction, and calling it aligned or not would both be inventions."""
    shape = tuple(representations.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"representations must be (prompts, languages, dim), none of them 0; got {shape}")
    x = representations if representations.dtype == torch.float64 else representations.float()
    # The largest entry first: squaring 1e-25 or 1e25 in float32 would give 0 or infinity. As the result
    # does not depend on the scale, the scale may be a constant for the gradient.
    largest = x.detach().abs().amax(-1, keepdim=True)
    if not ((largest >= TINY) & (largest < math.inf)).all():  # one question, so that a GPU is waited for once
        if not torch.isfinite(largest).all():
            raise BrokenDown("representations hold NaN or infinity")
        group, row = (largest[..., 0] < TINY).nonzero()[0].tolist()
        raise BrokenDown(f"representation of prompt {group}, language {row} is all zeros and has no direction")
    x = x / largest
    return x / x.norm(dim=-1, keepdim=True)


def singular_values(representations: torch.Tensor) -> torch.Tensor:
    """Singular values of each prompt's unit rows: (N, m, d) -> (N, r), largest first. Their squares sum to m.

    `svdvals` in float32 and not eigenvalues of the Gram matrix Z Zᵀ: squaring loses half the digits where it matters,
    near rank 1 (gradient error 0.84 against 7e-4 at a spread of 1e-4). And only the values: the gradient through
    singular *vectors* is infinite where two values are equal, this one is not."""
    # linalg has no bfloat16, and autocast must not bring it back in between.
    with torch.autocast(representations.device.type, enabled=False):
        return torch.linalg.svdvals(unit_rows(representations))


def mlc_loss(representations: torch.Tensor, tau: float = 0.2, form: str = "official") -> torch.Tensor:
    """The Multi-Lingual Consistency loss. (N, m, d) any float dtype -> scalar float32 (float64 stays).

    form "paper":     L = -mean log softmax(σ / τ)₁
    form "official":  L = -mean log softmax(σ / (sg(σ₁) τ))₁, sg = stop-gradient (the authors' code)

    Between `mlc_floor` (rank 1: all rows on one line) and `mlc_ceiling` (all singular values equal). Unchanged by the
    order of languages, a rotation of the space, a positive factor or a change of sign of any row: rows that point in
    opposite directions count as aligned. m = 1 gives 0, with zero gradient. Gradients are finite wherever the loss is
    defined, also at repeated and at identical rows.
    Raises ValueError for tau <= 0, an unknown form, and what `unit_rows` refuses."""
    if not tau > TINY:
        raise ValueError(f"tau must be > 0, got {tau}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    sigma = singular_values(representations)  # (N, r)
    if form == "official":
        sigma = sigma / sigma[:, :1].detach()
    return -torch.log_softmax(sigma / tau, dim=-1)[:, 0].mean()


def mlc_floor(languages: int, dim: int, tau: float = 0.2, form: str = "official") -> float:
    """The loss at rank 1, σ = (√m, 0, …, 0): log(1 + (r-1) exp(-s/τ)), s = 1 (official) or √m (paper).

    >>> round(mlc_floor(10, 512), 4)
    0.0589
    """
    first = {"official": 1.0, "paper": math.sqrt(languages)}[form]
    return math.log1p((min(languages, dim) - 1) * math.exp(-first / tau))


def mlc_ceiling(languages: int, dim: int) -> float:
    """The loss where all r singular values are equal (orthogonal rows, for m <= d): log r, in both forms."""
    return math.log(min(languages, dim))


def cosine_loss(representations: torch.Tensor) -> torch.Tensor:
    """Ablation: 1 - mean cosine over the pairs of languages. (N, m, d) -> scalar; m = 1 gives 0. Unlike MLC it asks for
    the same *direction*: a row of opposite sign is as wrong as can be."""
    with torch.autocast(representations.device.type, enabled=False):
        z = unit_rows(representations)
        m = z.shape[1]
        pairs = z.sum(1).square().sum(-1) - m  # the sum over ordered pairs i != j of z_i·z_j is |Σ z|² - m
        return 1 - (pairs / (m * (m - 1))).mean() if m > 1 else 0.0 * z.sum()


def separation_loss(representations: torch.Tensor, tau: float = 0.2) -> torch.Tensor:
    """Not in the paper: the second half of its ancestor PMRL (arXiv 2507.17343), which keeps prompts apart.
    Cross-entropy of "this prompt" among all prompts of the batch, by the cosines of their directions. (N, m, d) ->
    scalar, 0 for N = 1. A direction is the normalised mean row and not PMRL's first singular vector, whose sign is
    arbitrary and whose gradient is infinite where two singular values are equal."""
    with torch.autocast(representations.device.type, enabled=False):
        directions = unit_rows(unit_rows(representations).mean(1)[None])[0]  # (N, d)
        return -torch.log_softmax(directions @ directions.T / tau, dim=-1).diagonal().mean()
