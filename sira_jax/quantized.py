"""Frozen matrices held in 8 or 4 bits, through qwix: how one is made and read. The computation is in the model's type.

A quantised matrix is a tree of two arrays, the small integers and their scales, and stands in parameter trees where the matrix
would. "int8" has a scale a column; "int4" and "nf4" (arXiv 2305.14314) have one for each BLOCK numbers of a column. A scale is
that of the largest magnitude, in float32; values are rounded to the nearest.

Axis letters: D features in, F features out.
"""

import importlib
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sira_jax.errors import ConfigError

KINDS = ("none", "int8", "int4", "nf4")
BLOCK = 64


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is a quantised matrix."""
    return hasattr(leaf, "qvalue")


def check_available(kind: str) -> None:
    """Raises ConfigError if matrices cannot be held in this way, for want of qwix."""
    if kind != "none":
        _qwix(kind)


def quantize(kernel: jax.Array, kind: str) -> Any:
    """A matrix (D, F), or a stack of them (L, D, F), quantised where it lies.

    Blocks are of BLOCK numbers, or of the most that divides both BLOCK and D.

    Args:
      kernel: on one device or sharded; the result is sharded like it.
      kind: one of KINDS; "none" returns the matrix itself.
    """
    if kind == "none":
        return kernel
    qwix = _qwix(kind)
    rows = kernel.ndim - 2
    whole = [axis for axis in range(kernel.ndim) if axis != rows]
    tiles = {} if kind == "int8" else {rows: math.gcd(kernel.shape[rows], BLOCK)}

    def convert(x):
        x = x.astype(jnp.float32)
        return qwix.quantize(x, kind, channelwise_axes=whole, tiled_axes=tiles)

    sharding, out = kernel.sharding, None
    if isinstance(sharding, NamedSharding):
        shapes = jax.eval_shape(convert, kernel)
        out = jax.tree.map(lambda x: _like(sharding, x.shape), shapes)
    return jax.jit(convert, out_shardings=out)(kernel)


def dequantize(leaf: Any) -> Any:
    """The matrix of a quantised one; any other leaf as it is."""
    return _qwix("").dequantize(leaf) if is_quantized(leaf) else leaf


def product(x: jax.Array, kernel: Any) -> jax.Array:
    """x W, (..., F), of a quantised (D, F) kernel, in x's type; differentiable by x alone.

    The backward pass makes the matrix again: kept, it would be a copy of the whole base in the type of the computation.
    """

    @jax.checkpoint
    def multiply(x, kernel):
        return x @ dequantize(kernel).astype(x.dtype)

    return multiply(x, jax.lax.stop_gradient(kernel))


def _like(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding for the scales, which have the kernel's axes but fewer rows."""
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    sizes = [math.prod(sharding.mesh.shape[a] for a in _names(entry)) for entry in entries]
    kept = [e if n % size == 0 else None for e, n, size in zip(entries, shape, sizes, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _qwix(kind: str) -> types.ModuleType:
    try:
        return importlib.import_module("qwix")
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        raise ConfigError(
            f"model.quantization={kind!r} is not allowed: none, since qwix is not installed (pip install qwix)"
        ) from None


def words(x: jax.Array) -> jax.Array:
    """Integers of fewer than 8 bits as bytes, which can be reinterpreted; others as they are."""
    small = jnp.issubdtype(x.dtype, jnp.integer) and jax.dtypes.itemsize_bits(x.dtype) < 8
    return x.astype(jnp.uint8) if small else x
