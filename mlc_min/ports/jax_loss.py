"""`mlc_loss` in JAX, line by line as in consistency.py: to read, and to port from.

Without that file's refusals (rows of zeros, wrong shapes, unknown forms), which need concrete values and so do not go
with `jax.jit`. Under it, `form` is static: `jax.jit(mlc_loss, static_argnames="form")`. Arrays are float32 unless
`jax.config.update("jax_enable_x64", True)` says otherwise. Shapes: N prompts, m languages, d dimensions, r = min(m, d).
"""

import jax
import jax.numpy as jnp


def unit_rows(representations: jax.Array) -> jax.Array:
    """Divide each row by its length: (N, m, d) any float dtype -> (N, m, d) float32 (float64 stays)."""
    x = representations if representations.dtype == jnp.float64 else representations.astype(jnp.float32)
    # The largest entry first: squaring 1e-25 or 1e25 in float32 would give 0 or infinity. As the result
    # does not depend on the scale, the scale may be a constant for the gradient.
    largest = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
    x = x / largest
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def singular_values(representations: jax.Array) -> jax.Array:
    """Singular values of each prompt's unit rows: (N, m, d) -> (N, r), largest first.

    `compute_uv=False`, as the gradient through the values alone is finite where they repeat and where they are 0;
    the one through `eigvalsh` of Z Zᵀ and a square root is NaN at identical rows.
    """
    return jnp.linalg.svd(unit_rows(representations), compute_uv=False)


def mlc_loss(representations: jax.Array, tau: float = 0.2, form: str = "official") -> jax.Array:
    """(N, m, d) -> scalar; form "official" or "paper"."""
    sigma = singular_values(representations)  # (N, r)
    if form == "official":
        sigma = sigma / jax.lax.stop_gradient(sigma[:, :1])
    return -jax.nn.log_softmax(sigma / tau, axis=-1)[:, 0].mean()
