"""Parts that decoder blocks are made of: RMSNorm, attention with a cache, the gated MLP.

Axis letters: B batch, T queries, S keys, D width of the residual stream, H query heads, K key/value heads, P head width,
F hidden width of the MLP.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters import AdaptedDense, AdapterConfig, AdapterContext
from sira_jax.models.rope import apply_rotary
from sira_jax.placement import constrain
from sira_jax.routing import keep

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32 and returned in x's type. arXiv 1910.07467.

    With `plus_one` the factor is 1 + scale, and the parameter starts at 0.
    """

    epsilon: float
    param_dtype: Any = jnp.float32
    plus_one: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale_D = self.param(
            "scale",
            nn.with_logical_partitioning(init, ("norm",)),
            x_BTD.shape[-1:],
            self.param_dtype,
        )
        x32, scale_D = x_BTD.astype(jnp.float32), scale_D.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        factor_D = 1.0 + scale_D if self.plus_one else scale_D
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * factor_D
        return normed.astype(x_BTD.dtype)


class TokenEmbed(nn.Embed):
    """The table of token embeddings, read as `nn.Embed` reads it.

    The table's width is gathered first where it is cut: looked up in a part, the embeddings of all devices' tokens would be.
    """

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """The embeddings (B, T, D) of token ids."""
        table_VD = constrain(self.embedding.astype(self.dtype), "vocab", None)
        return constrain(jnp.take(table_VD, tokens_BT, axis=0), "batch", None, None)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which lies between -cap and cap; x itself without a cap. arXiv 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def capped_attention(
    q_BTHP: jax.Array,
    k_BSKP: jax.Array,
    v_BSKP: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    cap: float,
) -> jax.Array:
    """Attention whose logits are capped before the mask; logits and softmax in float32. Returns (B, T, H, P)."""
    batch, length, heads, width = q_BTHP.shape
    kv_heads = k_BSKP.shape[2]
    q_BTKGP = q_BTHP.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits_BKGTS = jnp.einsum(
        "btkgp,bskp->bkgts", q_BTKGP, k_BSKP, preferred_element_type=jnp.float32
    )
    logits_BKGTS = soft_cap(logits_BKGTS * scale, cap)
    # Finite, so that a query without any key gives numbers.
    least = jnp.finfo(jnp.float32).min
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, least)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKP.dtype)
    out_BTKGP = jnp.einsum("bkgts,bskp->btkgp", weights_BKGTS, v_BSKP)
    return out_BTKGP.reshape(q_BTHP.shape)


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

    def cached(self, name: str, new: jax.Array, length: int, index: jax.Array) -> jax.Array:
        """All slots of the cache `name`, (B, length, ...), after `new` (B, T, ...) went to those from `index` on."""
        shape = (new.shape[0], length, *new.shape[2:])
        cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, index, axis=1)
        return cache.value


class Attention(Projections):
    """Causal self-attention with grouped queries and rotary positions (arXiv 2305.13245, 2104.09864).

    As the config says, each head of q and k is normed before it is rotated (arXiv 2010.04245), and the logits are capped.
    """

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
            return constrain(y.reshape(batch, length, count, width), "batch", None, axis, None)

        q_BTHP = project("q", heads, "heads")
        k_BSKP = project("k", kv_heads, "kv_heads")
        v_BSKP = project("v", kv_heads, "kv_heads")
        if config.qk_norm:
            q_BTHP, k_BSKP = (
                RMSNorm(config.norm_eps, config.param_dtype, config.norm_plus_one, name=name)(x)
                for name, x in (("q_norm", q_BTHP), ("k_norm", k_BSKP))
            )
        q_BTHP, k_BSKP = apply_rotary(q_BTHP, rotary), apply_rotary(k_BSKP, rotary)
        if cache_index is not None:
            k_BSKP = self.cached("cached_key", k_BSKP, mask_BTS.shape[-1], cache_index)
            v_BSKP = self.cached("cached_value", v_BSKP, mask_BTS.shape[-1], cache_index)
        scale = 1 / math.sqrt(config.query_pre_attn_scalar or width)
        if config.attention_softcap is None:
            out_BTHP = jax.nn.dot_product_attention(
                q_BTHP, k_BSKP, v_BSKP, mask=mask_BTS[:, None], scale=scale
            )
        else:
            cap = config.attention_softcap
            out_BTHP = capped_attention(q_BTHP, k_BSKP, v_BSKP, mask_BTS, scale, cap)
        out_BTD = keep(out_BTHP.reshape(batch, length, heads * width))
        return self.dense("o", config.emb_dim, ("heads", "embed"))(out_BTD, context)


class MLP(Projections):
    """The gated MLP: down(activation(gate(x)) * up(x)), SwiGLU with silu and GeGLU with gelu. arXiv 2002.05202."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        axes = ("embed", "mlp")
        gate_BTF = self.dense("gate", self.config.mlp_dim, axes)(x_BTD, context)
        up_BTF = self.dense("up", self.config.mlp_dim, axes)(x_BTD, context)
        # Made again backwards from what the projections give: kept, it would be three more arrays of this size.
        activation = ACTIVATIONS[self.config.activation]
        gated = jax.checkpoint(lambda gate, up: activation(gate) * up, prevent_cse=False)
        hidden_BTF = gated(gate_BTF, up_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", None, "mlp")
        return self.dense("down", self.config.emb_dim, axes[::-1])(hidden_BTF, context)
