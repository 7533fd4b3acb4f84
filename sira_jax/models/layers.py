"""Parts that decoder blocks are made of: RMSNorm, rotary embedding, attention with a cache, SwiGLU.

Axis letters: B batch, T queries, S keys, D width of the residual stream, H query heads, K key/value heads, P head width,
F hidden width of the MLP.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters import AdaptedDense, AdapterConfig, AdapterContext
from sira_jax.models.config import DecoderConfig, RopeScaling


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32 and returned in x's type. arXiv 1910.07467."""

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            x_BTD.shape[-1:],
            self.param_dtype,
        )
        x32 = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale_D.astype(jnp.float32)
        return normed.astype(x_BTD.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequencies, radians a position, shape (head_dim / 2,). arXiv 2104.09864; scaling as in Llama 3.1."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 0 at the long waves (stretched), 1 at the short ones (kept), linear in positions/wavelength between.
    turns = scaling.original_max_positions / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotary_tables(positions_BT: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, T, 1, P / 2) in float32, the 1 standing for the heads."""
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BTHP: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + P / 2): Hugging Face's half-split layout. Float32 inside, x's type outside."""
    cos, sin = tables
    first, second = jnp.split(x_BTHP.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHP.dtype)


class Projections(nn.Module):
    """Base of modules that hold adapted projections: builds each with the adapter its path selects."""

    config: Any
    adapter: AdapterConfig | None
    # Of the stack the block is in, "encoder/"; it opens the path.
    prefix: str = ""

    def dense(
        self, name: str, features: int, axes: tuple[str, str], use_bias: bool = False
    ) -> AdaptedDense:
        """The projection `name` of this module; its path for adapter targets is "<prefix><module name>/<name>"."""
        path = f"{self.prefix}{self.name}/{name}"
        adapter = self.adapter and self.adapter.for_projection(path)
        return AdaptedDense(
            features=features,
            adapter=adapter,
            use_bias=use_bias,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            kernel_axes=axes,
            path=path,
            name=name,
        )


class Attention(Projections):
    """Causal self-attention with grouped queries and rotary positions (arXiv 2305.13245, 2104.09864)."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        context: AdapterContext,
        cache_index: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from (B, T, D) and returns (B, T, D).

        Args:
          x_BTD: input.
          mask_BTS: True where a query may see a key. S = T, or the cache's length while decoding.
          rotary: tables of the queries' positions.
          context: see AdapterContext.
          cache_index: while decoding, the slot of the cache where these T tokens go (scalar); None in training.
        """
        config = self.config
        batch, length, _ = x_BTD.shape
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.qkv_bias

        def project(name, count, axis):
            y = self.dense(name, count * width, ("embed", axis), use_bias=bias)(x_BTD, context)
            return y.reshape(batch, length, count, width)

        q_BTHP = apply_rotary(project("q", heads, "heads"), rotary)
        k_BSKP = apply_rotary(project("k", kv_heads, "kv_heads"), rotary)
        v_BSKP = project("v", kv_heads, "kv_heads")
        if cache_index is not None:
            k_BSKP = self._cached("cached_key", k_BSKP, mask_BTS.shape[-1], cache_index)
            v_BSKP = self._cached("cached_value", v_BSKP, mask_BTS.shape[-1], cache_index)
        out_BTHP = jax.nn.dot_product_attention(q_BTHP, k_BSKP, v_BSKP, mask=mask_BTS[:, None])
        out_BTD = out_BTHP.reshape(batch, length, heads * width)
        return self.dense("o", config.emb_dim, ("heads", "embed"))(out_BTD, context)

    def _cached(self, name: str, new: jax.Array, length: int, index: jax.Array) -> jax.Array:
        shape = (new.shape[0], length, *new.shape[2:])
        cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, index, axis=1)
        return cache.value


class MLP(Projections):
    """SwiGLU: down(silu(gate(x)) * up(x)). arXiv 2002.05202."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        axes = ("embed", "mlp")
        gate_BTF = self.dense("gate", self.config.mlp_dim, axes)(x_BTD, context)
        up_BTF = self.dense("up", self.config.mlp_dim, axes)(x_BTD, context)
        hidden_BTF = nn.silu(gate_BTF) * up_BTF
        return self.dense("down", self.config.emb_dim, axes[::-1])(hidden_BTF, context)
