"""The products of tokens with a small trained matrix.

Axis letters: N tokens, D features in, F features out.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The name under which jax.checkpoint keeps what `keep` marks.
KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """x, which the rematerialisation policy "projections" keeps for the backward pass."""
    return checkpoint_name(x, KEPT)


def project(x: jax.Array, kernel_DF: jax.Array, **options) -> jax.Array:
    """x (..., D) times a kernel (D, F): (..., F) in float32, accumulated in float32.

    Tokens are put on one axis, since XLA's CPU backend writes out a transposed copy of the whole cotangent for the gradient
    of the kernel where two axes are summed over: for a narrow kernel that takes longer than the products.

    Args:
      x: tokens, any number of axes before the last.
      kernel_DF: the kernel, of x's type.
      **options: of jnp.dot, such as precision.
    """
    return jax.checkpoint(functools.partial(_project, **options), prevent_cse=False)(x, kernel_DF)


def _project(x: jax.Array, kernel_DF: jax.Array, **options) -> jax.Array:
    # Checkpointed, so that what is kept for the backward pass is x itself: its reshaped copies, one a projection
    # that reads x, would each be stored by a scan over layers.
    x_ND = x.reshape(-1, x.shape[-1])
    y_NF = jnp.dot(x_ND, kernel_DF, preferred_element_type=jnp.float32, **options)
    return y_NF.reshape(*x.shape[:-1], -1)
