"""Rotary positions: frequencies, their scaling beyond the trained length, tables and the rotation.

Axis letters: B batch, T queries, H heads, P head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sira_jax.errors import check, is_finite_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 and later (its `rope_scaling` with rope_type "llama3").

    Wave lengths beyond `original_max_positions / low_freq_factor` are stretched by `factor`, those under
    `original_max_positions / high_freq_factor` are kept, and those between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(is_finite_number(value), f"rope_scaling.{field.name}", value, "a number")
        check(self.factor >= 1, "rope_scaling.factor", self.factor, "at least 1")
        check(
            self.low_freq_factor > 0, "rope_scaling.low_freq_factor", self.low_freq_factor, "over 0"
        )
        check(
            self.high_freq_factor > self.low_freq_factor,
            "rope_scaling.high_freq_factor",
            self.high_freq_factor,
            f"over low_freq_factor={self.low_freq_factor}",
        )
        check(
            self.original_max_positions > 0,
            "rope_scaling.original_max_positions",
            self.original_max_positions,
            "over 0",
        )

    def scale(self, frequencies: jax.Array) -> jax.Array:
        """Angular frequencies, radians a position, as this scaling changes them."""
        wavelengths = 2 * math.pi / frequencies
        # 0 at the long waves (stretched), 1 at the short ones (kept), linear in positions/wavelength between.
        turns = self.original_max_positions / wavelengths
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return (1 - blend) * frequencies / self.factor + blend * frequencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """All wave lengths stretched by `factor` (rope_type "linear"; Gemma 3's global layers). arXiv 2306.15595."""

    factor: float

    def __post_init__(self):
        is_allowed = is_finite_number(self.factor) and self.factor >= 1
        check(is_allowed, "rope_scaling.factor", self.factor, "a number of at least 1")

    def scale(self, frequencies: jax.Array) -> jax.Array:
        """Angular frequencies, radians a position, as this scaling changes them."""
        return frequencies / self.factor


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | LinearRopeScaling | None
) -> jax.Array:
    """Angular frequencies, radians a position, shape (head_dim / 2,). arXiv 2104.09864."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    return frequencies if scaling is None else scaling.scale(frequencies)


def rotary_tables(
    positions_BT: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | LinearRopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, T, 1, P / 2) in float32, the 1 standing for the heads."""
    frequencies = rotary_frequencies(head_dim, theta, scaling)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BTHP: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + P / 2): Hugging Face's half-split layout. Float32 inside, x's type outside."""
    cos, sin = tables
    first, second = jnp.split(x_BTHP.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHP.dtype)
