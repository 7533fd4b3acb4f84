"""Tokens times A and times the router in one product, the logits to float32's precision whatever the type of the tokens.

A bfloat16 number times a float32 one needs no float32 product: the float32 one is the sum of three bfloat16 numbers, and each
partial product of two bfloat16 numbers is exact in float32. So the router stands beside A as three narrow matrices, and one
pass over the tokens gives both. Backwards the same is done with the logits' cotangent for the router's gradient. As two
products, the tokens would be read twice, their cotangent would come in two parts that are stored and summed, and the router's
product would take six passes of a matrix unit.

Axis letters: N tokens, D features in, M columns of A, E experts.
"""

import jax
import jax.numpy as jnp

from sira_jax.routing.products import keep, project

# Of a float32 array in `split`.
PARTS = 3


def can_join(dtype: jnp.dtype) -> bool:
    """Whether `project_with_router` takes tokens of this type."""
    return dtype in (jnp.float32, jnp.bfloat16)


def project_with_router(
    x: jax.Array, weights_DM: jax.Array, router_DE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x @ weights, x @ router), both float32, in one product.

    Float32 tokens meet both at the precision the router needs, forwards and backwards. Bfloat16 tokens meet the weights
    rounded to bfloat16 and the router as it is. Their own cotangent is right to bfloat16's precision, the weights' is of the
    hidden cotangent rounded to bfloat16, and the router's is right to float32's.

    Args:
      x: (..., D), float32 or bfloat16.
      weights_DM: float32.
      router_DE: float32.
    """
    # See `products.project`: x itself is kept for the backward pass.
    return jax.checkpoint(_project_with_router, prevent_cse=False)(x, weights_DM, router_DE)


def _project_with_router(x, weights_DM, router_DE):
    x_ND = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.bfloat16:
        hidden_NM, logits_NE = _split_product(x_ND, weights_DM, router_DE)
    else:
        joined_DM = jnp.concatenate([weights_DM, router_DE], axis=1)
        joined_NM = project(x_ND, joined_DM, precision=jax.lax.Precision.HIGHEST)
        hidden_NM, logits_NE = jnp.split(joined_NM, [weights_DM.shape[1]], axis=-1)
    return tuple(keep(y.reshape(*x.shape[:-1], -1)) for y in (hidden_NM, logits_NE))


def split(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is x, float32, to its precision; the largest part first."""
    parts = []
    for _ in range(PARTS):
        # Not a cast and back, which compilers may take for nothing.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _sum_parts(x: jax.Array, size: int) -> jax.Array:
    """Sums the parts of `split` that stand side by side on the last axis, smallest first."""
    first, second, third = jnp.split(x, [size, 2 * size], axis=-1)
    return first + (second + third)


@jax.custom_vjp
def _split_product(x_ND, weights_DM, router_DE):
    columns = [weights_DM.astype(jnp.bfloat16), *split(router_DE)]
    joined = project(x_ND, jnp.concatenate(columns, axis=1))
    hidden_NM, parts = jnp.split(joined, [weights_DM.shape[1]], axis=-1)
    return hidden_NM, _sum_parts(parts, router_DE.shape[1])


def _forward(x_ND, weights_DM, router_DE):
    return _split_product(x_ND, weights_DM, router_DE), (x_ND, weights_DM, router_DE)


def _backward(saved, cotangents):
    x_ND, weights_DM, router_DE = saved
    d_hidden_NM, d_logits_NE = cotangents
    d_hidden_NM = d_hidden_NM.astype(jnp.bfloat16)
    parts = split(d_logits_NE)
    d_joined = project(x_ND.T, jnp.concatenate([d_hidden_NM, *parts], axis=1))
    d_weights_DM, d_parts = jnp.split(d_joined, [weights_DM.shape[1]], axis=-1)
    # The largest three of the nine products of parts: the sum is rounded to bfloat16.
    large, small, _ = parts
    router_large, router_small, _ = split(router_DE)
    left = jnp.concatenate([d_hidden_NM, large, large, small], axis=1)
    right = [weights_DM.astype(jnp.bfloat16), router_large, router_small, router_large]
    d_x_ND = project(left, jnp.concatenate(right, axis=1).T)
    return d_x_ND.astype(x_ND.dtype), d_weights_DM, _sum_parts(d_parts, router_DE.shape[1])


_split_product.defvjp(_forward, _backward)
