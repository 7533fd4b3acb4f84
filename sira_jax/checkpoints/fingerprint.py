"""A name for a set of parameters: equal for equal values, however they are laid out on devices and
whether a stack's layers are stacked or apart.

Each leaf is hashed where it is, by sums that do not depend on the order of summation; 8 bytes of it
come to the host. It guards against mixing up models, not against someone who wants two models to
have the same name.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sira_jax.checkpoints.layout import flatten
from sira_jax.quantized import is_quantized, words

# Seeds and odd multipliers of the two hashes: digits of the fractions of square roots of 2, 3, 5
# and 7, taken for having no pattern.
_SEEDS = ((0x6A09E667, 0xBB67AE85), (0x3C6EF373, 0xA54FF53B))
_CHUNK = 1 << 20  # elements whose hashes are in memory at a time


def fingerprint(params: Mapping) -> str:
    """Returns 64 hexadecimal digits that name a parameter tree.

    Changing one bit of one element, swapping two elements, rows or layers, or renaming, reshaping
    or converting a leaf gives another name (a swap goes unseen with a probability under 2^-50).
    Sharding and devices do not matter, nor does it whether the layers of a stack are stacked
    ("layers", or "encoder/layers") or apart ("layers_0", ...).

    Args:
      params: nested mapping of arrays. Every process of a multi-host run must call this.
    """
    flat = sorted((path, jnp.asarray(leaf)) for path, leaf in _arrays(params).items())
    hashes = np.stack([_leaf_hash(leaf, _without_layer(path)[1]) for path, leaf in flat])
    if not all(leaf.is_fully_addressable for _, leaf in flat):
        hashes = multihost_utils.process_allgather(hashes).sum(axis=0, dtype=np.uint32)
    names: dict[tuple, list[np.ndarray]] = {}
    for (path, leaf), numbers in zip(flat, hashes, strict=True):
        stacked_path, layer = _without_layer(path)
        key = (stacked_path, layer is not None, leaf.shape, str(leaf.dtype))
        names.setdefault(key, []).append(numbers)
    lines = []
    for (path, apart, shape, dtype), parts in sorted(names.items(), key=lambda item: item[0]):
        shape = (len(parts), *shape) if apart else shape
        total = np.sum(parts, axis=0, dtype=np.uint32)
        lines.append(json.dumps([path, shape, dtype, *(int(number) for number in total)]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _arrays(params: Mapping) -> dict[tuple[str, ...], jax.Array]:
    """The arrays by their paths; a quantised matrix is several, as if it were a mapping of them."""
    arrays = {}
    for path, leaf in flatten(params).items():
        parts = {"": leaf}
        if is_quantized(leaf):
            named = jax.tree_util.tree_leaves_with_path(leaf)
            parts = {jax.tree_util.keystr(keys, simple=True): part for keys, part in named}
        arrays |= {(*path, name) if name else path: part for name, part in parts.items()}
    return arrays


def _without_layer(path: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
    """The path that a leaf has where its layers are stacked, and its layer; None where it is of no layer apart.

    A stack is at the root or one level below.
    """
    for place, name in enumerate(path[:2]):
        match = re.fullmatch(r"layers_(\d+)", name)
        if match:
            return (*path[:place], "layers", *path[place + 1 :]), int(match[1])
    return path, None


def _leaf_hash(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """(2,) uint32: sums over the parts of a leaf on this process's devices, each part once.

    A leaf of layer `layer` is hashed as that row of the stacked leaf.
    """
    total = np.zeros(2, np.uint32)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            part, start = shard.data, _start(shard.index, leaf.shape)
            if layer is not None:
                part, start = part[None], np.concatenate([[np.uint32(layer)], start])
            total += np.asarray(_part_hash(part, start))
    return total


def _start(index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    starts = [item.indices(size)[0] for item, size in zip(index, shape, strict=True)]
    return np.asarray(starts, np.uint32)


@jax.jit
def _part_hash(x: jax.Array, start: jax.Array) -> jax.Array:
    """(2,) uint32: sums over elements of mix(bits) times an odd number given by the position.

    The sums wrap around, so that any order, and any split into parts, gives the same.

    Args:
      x: the part.
      start: (x.ndim,) position of its first element in the whole leaf.
    """
    x = words(x)
    if x.dtype.itemsize == 2:
        # Here and not in the loop: on CPU, slices of 16-bit floats go through float32, all of x at
        # once. Of wider types this would be a copy.
        x = _bits(x)
    rows = x.shape[0] if x.ndim else 1
    step = max(1, _CHUNK // max(1, math.prod(x.shape[1:])))
    if step >= rows:
        return _sums(x, start)

    def add(index, total, rows=step):
        chunk = jax.lax.dynamic_slice_in_dim(x, index * step, rows)
        return total + _sums(chunk, start.at[0].add(jnp.uint32(index * step)))

    total = jax.lax.fori_loop(0, rows // step, add, jnp.zeros(2, jnp.uint32))
    return add(rows // step, total, rows % step) if rows % step else total


def _bits(x: jax.Array) -> jax.Array:
    """Elements as unsigned integers of their own width; 64 bits are two along a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned)


def _sums(x: jax.Array, start: jax.Array) -> jax.Array:
    words = _bits(x).astype(jnp.uint32)
    start = jnp.concatenate([start, jnp.zeros(words.ndim - x.ndim, jnp.uint32)])
    hashes = []
    for seed, multiplier in _SEEDS:
        # Axis by axis: a flat index would wrap around in a leaf of over 2^32 elements.
        position = jnp.uint32(seed)
        for axis, size in enumerate(words.shape):
            along = tuple(size if other == axis else 1 for other in range(words.ndim))
            index = jax.lax.broadcasted_iota(jnp.uint32, along, axis) + start[axis]
            position = _mix((position + index) * jnp.uint32(multiplier))
        terms = _mix(words ^ jnp.uint32(seed)) * (position | 1)
        hashes.append(jnp.sum(terms, dtype=jnp.uint32))
    return jnp.stack(hashes)


def _mix(x: jax.Array) -> jax.Array:
    """A one-to-one scramble of uint32 (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
