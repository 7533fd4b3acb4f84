"""Parts that blocks of the T5 family are made of: relative positions, attention to the own stream or the encoder's, the MLP.

Sources: arXiv 1910.10683 (T5), 2002.05202 (gated MLPs), 2304.09151 (umT5's table in every block).

Axis letters: B batch, T queries, S keys, D width of the residual stream, H heads, P head width, N buckets, F hidden width.
"""

import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters import AdapterContext
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig
from sira_jax.models.layers import Projections
from sira_jax.placement import constrain
from sira_jax.routing import keep

_ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}


@functools.lru_cache(maxsize=8)
def distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0..max_distance, int32 (max_distance + 1,); farther ones share the last.

    The first half of the buckets holds one distance each. The other half divides the rest up to `max_distance` evenly on a
    logarithmic scale. In whole numbers, since distances lie exactly on the borders (16 of 128 with 8 exact ones), where
    rounded logarithms may fall on either side.
    """
    exact = num_buckets // 2
    rest = num_buckets - exact
    buckets = []
    for distance in range(max_distance + 1):
        if distance < exact:
            buckets.append(distance)
            continue
        # The largest step with log(distance / exact) / log(max_distance / exact) * rest >= step.
        step = 0
        while (
            step + 1 < rest
            and distance**rest * exact ** (step + 1) >= max_distance ** (step + 1) * exact**rest
        ):
            step += 1
        buckets.append(exact + step)
    return np.asarray(buckets, np.int32)


def relative_buckets(
    offsets: jax.Array, num_buckets: int, max_distance: int, *, bidirectional: bool
) -> jax.Array:
    """Buckets of the offsets key - query, int32 in [0, num_buckets).

    Args:
      offsets: int, any shape.
      num_buckets: N. With `bidirectional` the upper half is for keys after the query; otherwise those count as distance 0.
      max_distance: see `distance_buckets`.
      bidirectional: whether queries see keys that follow.
    """
    ways = 2 if bidirectional else 1
    table = jnp.asarray(distance_buckets(num_buckets // ways, max_distance))
    distances = jnp.abs(offsets) if bidirectional else jnp.maximum(-offsets, 0)
    buckets = table[jnp.minimum(distances, max_distance)]
    return jnp.where(offsets > 0, buckets + num_buckets // 2, buckets) if bidirectional else buckets


class RelativePositionBias(nn.Module):
    """A learned number for each head and bucket of distances, which attention adds to its scores.

    Distances are those of slots. Between tokens of one packed example these are the distances of positions.
    """

    config: EncoderDecoderConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, query_start: Any, num_queries: int, num_keys: int) -> jax.Array:
        """(1, H, T, S) in float32 for queries in the slots from `query_start` on and keys in those from 0 on."""
        config = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table_HN = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", None)),
            (config.num_heads, config.relpos_num_buckets),
            config.param_dtype,
        )
        queries_T = query_start + jnp.arange(num_queries)
        buckets_TS = relative_buckets(
            jnp.arange(num_keys) - queries_T[:, None],
            config.relpos_num_buckets,
            config.relpos_max_distance,
            bidirectional=self.bidirectional,
        )
        return jnp.asarray(table_HN, jnp.float32)[None, :, buckets_TS]


class _Attention(Projections):
    """What attention to either stream has in common; scores are not scaled by the heads' width."""

    def heads(self, name: str, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """The projection `name` of x, (B, T, H, P)."""
        config = self.config
        dense = self.dense(name, config.num_heads * config.head_dim, ("embed", "heads"))
        shape = (*x_BTD.shape[:2], config.num_heads, config.head_dim)
        return constrain(dense(x_BTD, context).reshape(shape), "batch", None, "heads", None)

    def attend(self, q_BTHP, k_BSHP, v_BSHP, mask_BTS, bias_1HTS, context) -> jax.Array:
        """Softmax in float32, then the projection "out": (B, T, D)."""
        out_BTHP = jax.nn.dot_product_attention(
            q_BTHP, k_BSHP, v_BSHP, bias=bias_1HTS, mask=mask_BTS[:, None], scale=1.0
        )
        out_BTE = keep(out_BTHP.reshape(*out_BTHP.shape[:2], -1))
        out_BTD = self.dense("out", self.config.emb_dim, ("heads", "embed"))(out_BTE, context)
        return constrain(out_BTD, "batch", None, None)


class SelfAttention(_Attention):
    """Attention to the own stream."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        bias_1HTS: jax.Array,
        context: AdapterContext,
        cache_index: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from (B, T, D) and returns (B, T, D).

        Args:
          x_BTD: input.
          mask_BTS: True where a query may see a key. S = T, or the cache's length while decoding.
          bias_1HTS: see RelativePositionBias.
          context: see AdapterContext.
          cache_index: while decoding, the slot of the cache where these T tokens go (scalar); None otherwise.
        """
        q_BTHP = self.heads("query", x_BTD, context)
        k_BSHP = self.heads("key", x_BTD, context)
        v_BSHP = self.heads("value", x_BTD, context)
        if cache_index is not None:
            k_BSHP = self.cached("cached_key", k_BSHP, mask_BTS.shape[-1], cache_index)
            v_BSHP = self.cached("cached_value", v_BSHP, mask_BTS.shape[-1], cache_index)
        return self.attend(q_BTHP, k_BSHP, v_BSHP, mask_BTS, bias_1HTS, context)


class CrossAttention(_Attention):
    """Attention of the decoder to what the encoder returned; it has no relative positions.

    While decoding, the first call keeps keys and values in the collection `cache`, later calls take them from there.
    """

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        encoded_BSD: jax.Array | None,
        mask_BTS: jax.Array,
        context: AdapterContext,
        encoder_context: AdapterContext | None,
    ) -> jax.Array:
        """Attends from (B, T, D) and returns (B, T, D).

        Args:
          x_BTD: input of the queries.
          encoded_BSD: input of the keys and values; None in later calls of decoding.
          mask_BTS: True where a query may see a key.
          context: of the decoder's tokens.
          encoder_context: of the encoder's, for the adapters on "key" and "value"; None where `encoded_BSD` is.
        """
        q_BTHP = self.heads("query", x_BTD, context)
        if encoded_BSD is None:
            k_BSHP = self.get_variable("cache", "cached_key")
            v_BSHP = self.get_variable("cache", "cached_value")
        else:
            k_BSHP = self.heads("key", encoded_BSD, encoder_context)
            v_BSHP = self.heads("value", encoded_BSD, encoder_context)
            if context.decoding:
                self.put_variable("cache", "cached_key", k_BSHP)
                self.put_variable("cache", "cached_value", v_BSHP)
        return self.attend(q_BTHP, k_BSHP, v_BSHP, mask_BTS, None, context)


class T5MLP(Projections):
    """wo(product of the activated input projections): relu(wi(x)), or gelu(wi_0(x)) * wi_1(x)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        config, axes = self.config, ("embed", "mlp")
        hidden_BTF = functools.reduce(
            operator.mul,
            (
                _ACTIVATIONS[activation](self.dense(name, config.mlp_dim, axes)(x_BTD, context))
                for name, activation in zip(config.mlp_inputs, config.mlp_activations, strict=True)
            ),
        )
        hidden_BTF = constrain(hidden_BTF, "batch", None, "mlp")
        out_BTD = self.dense("wo", config.emb_dim, axes[::-1])(hidden_BTF, context)
        return constrain(out_BTD, "batch", None, None)
