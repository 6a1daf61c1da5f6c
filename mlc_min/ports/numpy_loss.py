"""`mlc_loss` in NumPy, line by line as in consistency.py, and its gradient by formula: to read, and to port from.

Without that file's refusals (rows of zeros, wrong shapes, unknown forms). Shapes: N prompts, m languages, d
dimensions, r = min(m, d); float32 gives float32, float64 gives float64.
"""

import numpy as np


def row_lengths(representations: np.ndarray) -> np.ndarray:
    """The length of each row: (N, m, d) -> (N, m, 1)."""
    # The largest entry first: squaring 1e-25 or 1e25 in float32 would give 0 or infinity.
    largest = np.abs(representations).max(-1, keepdims=True)
    return largest * np.linalg.norm(representations / largest, axis=-1, keepdims=True)


def unit_rows(representations: np.ndarray) -> np.ndarray:
    """Divide each row by its length: (N, m, d) -> (N, m, d)."""
    return representations / row_lengths(representations)


def singular_values(representations: np.ndarray) -> np.ndarray:
    """Singular values of each prompt's unit rows: (N, m, d) -> (N, r), largest first."""
    return np.linalg.svd(unit_rows(representations), compute_uv=False)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; the largest is taken off first, for exp(1000) is infinite."""
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mlc_loss(representations: np.ndarray, tau: float = 0.2, form: str = "official") -> np.floating:
    """(N, m, d) -> scalar; form "official" or "paper"."""
    sigma = singular_values(representations)  # (N, r)
    if form == "official":
        sigma = sigma / sigma[:, :1]
    return -log_softmax(sigma / tau)[:, 0].mean()


def mlc_loss_gradient(representations: np.ndarray, tau: float = 0.2, form: str = "official") -> np.ndarray:
    """∂L/∂representations: (N, m, d) -> (N, m, d). In the official form the σ₁ that divides is a constant.

    Where the gradient is not unique (σ₁ = σ₂, or σ_r = 0), it is one of the valid ones.
    """
    z = unit_rows(representations)
    u, sigma, vt = np.linalg.svd(z, full_matrices=False)  # (N, m, r), (N, r), (N, r, d)
    scale = tau * sigma[:, :1] if form == "official" else tau
    by_sigma = np.exp(log_softmax(sigma / scale))  # ∂L/∂σ = (softmax - e₁) / scale / N
    by_sigma[:, 0] -= 1
    by_sigma = by_sigma / scale / len(z)
    by_z = u * by_sigma[:, None, :] @ vt  # ∂σⱼ/∂Z = uⱼ vⱼᵀ
    return through_unit_rows(representations, by_z)


def through_unit_rows(representations: np.ndarray, by_z: np.ndarray) -> np.ndarray:
    """∂L/∂z -> ∂L/∂representations, both (N, m, d): what points along a row does nothing, the rest shrinks by its
    length."""
    z = unit_rows(representations)
    across = by_z - (by_z * z).sum(-1, keepdims=True) * z
    return across / row_lengths(representations)
