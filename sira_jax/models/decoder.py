"""Decoder-only transformer with adapters on its projections; which family it is, is a matter of its config's fields.

Axis letters: B batch, T length of this call, S keys (T, or the cache's length), D width, L layers, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sira_jax.adapters import AdapterConfig, AdapterContext, LayerLink
from sira_jax.models.config import DecoderConfig
from sira_jax.models.layers import MLP, Attention, RMSNorm, TokenEmbed, soft_cap
from sira_jax.models.rope import rotary_tables
from sira_jax.models.stacking import advance_cache, initial_carry, make_blocks
from sira_jax.placement import constrain

Batch = Mapping[str, jax.Array]


@struct.dataclass
class LayerView:
    """What the layers of one kind see: which keys (B, T, S), and the rotary tables of the queries' positions."""

    mask_BTS: jax.Array
    rotary: tuple[jax.Array, jax.Array]


class DecoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); both summands normed again with sandwich norms."""

    config: DecoderConfig
    adapter: AdapterConfig | None

    @nn.compact
    def __call__(self, state, views, is_windowed, context, cache_index):
        """One layer.

        Args:
          state: (x_BTD, carry), the carry being what adapters hand from layer to layer (see `LayerLink`).
          views: the one view of this layer; or (global, windowed), of which `is_windowed` selects, so that one compiled
            block serves scanned layers of both kinds.
          is_windowed: a boolean scalar, or None with one view.
          context: see AdapterContext.
          cache_index: see Attention.
        """
        config = self.config
        view, *others = views
        if others:
            view = jax.tree.map(lambda whole, own: jnp.where(is_windowed, own, whole), *views)
        x_BTD, carry = state
        link = LayerLink(carry)
        block_module = self.adapter and self.adapter.make_block_module()
        if block_module is not None:
            context = context.replace(block=block_module(x_BTD, context))
        context = context.replace(link=link)

        def norm(name):
            return RMSNorm(config.norm_eps, config.param_dtype, config.norm_plus_one, name=name)

        def normed(name, y_BTD):
            return norm(name)(y_BTD) if config.sandwich_norms else y_BTD

        attention = Attention(config, self.adapter, name="attention")
        mlp = MLP(config, self.adapter, name="mlp")
        h_BTD = norm("input_norm")(x_BTD)
        h_BTD = attention(h_BTD, view.mask_BTS, view.rotary, context, cache_index)
        x_BTD = constrain(x_BTD + normed("post_attention_norm", h_BTD), "batch", None, None)
        h_BTD = mlp(norm("mlp_norm")(x_BTD), context)
        x_BTD = constrain(x_BTD + normed("post_mlp_norm", h_BTD), "batch", None, None)
        return (x_BTD, carry | link.next), None


class Decoder(nn.Module):
    """Token ids to logits.

    A batch is a mapping with the names that SeqIO and T5X use, each (B, T): `decoder_input_tokens`, and optionally
    `decoder_segment_ids` (0 is padding, 1.. the examples packed in a row; default all 1), `decoder_positions` (default
    0..T-1), `task_ids` (for per-task router metrics), `decoder_loss_weights` (they tell an adapter that routes by the prompt
    where a prompt ends; without them all tokens are the prompt's) and `adapter_ids` (B,), which of an AdapterSet's adapters
    a row uses.

    Collections: `params`; `cache` while decoding; `losses` and `metrics` are sown by adapters. RNG streams in training:
    `dropout`, `expert_dropout` and `expert_choice`.

    Attributes:
      config: sizes.
      adapter: adapter for the projections it targets, or None for the frozen model.
      num_tasks: how many tasks the router's metrics tell apart; 0 for none.
    """

    config: DecoderConfig
    adapter: AdapterConfig | None = None
    num_tasks: int = 0

    def setup(self):
        config = self.config
        self.token_embedder = TokenEmbed(
            config.vocab_size,
            config.emb_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocab", "embed")
            ),
        )
        # Which layers are windowed goes along the layers, all else is the same for all.
        in_axes = (nn.broadcast, 0, nn.broadcast, nn.broadcast)
        self.layers = make_blocks(DecoderBlock, config.num_layers, config, self.adapter, in_axes)
        self.final_norm = RMSNorm(config.norm_eps, config.param_dtype, config.norm_plus_one)
        if not config.tie_embeddings:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.normal(0.02), ("embed", "vocab")
                ),
            )

    @nn.nowrap
    def init_batch(self) -> dict[str, jax.Array]:
        """The smallest batch to initialise with: a model's parameters do not depend on it."""
        return {"decoder_input_tokens": jnp.zeros((1, 2), jnp.int32)}

    def __call__(
        self,
        batch: Batch,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        progress: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V) in float32: `logits` of `features`."""
        return self.logits(
            self.features(
                batch, deterministic=deterministic, cache_length=cache_length, progress=progress
            )
        )

    def features(
        self,
        batch: Batch,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        progress: jax.Array | None = None,
    ) -> jax.Array:
        """Final normalised activations (B, T, D), before the projection onto the vocabulary.

        `progress` is the share of the training that is done, for adapters with a schedule.

        With `cache_length`, keys and values go to a cache of that many slots (collection `cache`, mutable): the first call
        fills it from slot 0, later calls go on where the last one ended. Rows may start with padding (segment id 0), so
        that prompts of unequal length end in the same slot; positions must then be given and start at 0 on the first
        real token.
        """
        tokens_BT = batch["decoder_input_tokens"]
        segments_BT = batch.get("decoder_segment_ids")
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        positions_BT = batch.get("decoder_positions")
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        context = AdapterContext(
            valid_BT=segments_BT > 0,
            segment_ids_BT=segments_BT,
            prompt_BT=prompt_mask(segments_BT, batch.get("decoder_loss_weights")),
            task_ids_BT=batch.get("task_ids") if self.num_tasks else None,
            progress=progress,
            adapter_ids_B=batch.get("adapter_ids"),
            num_tasks=self.num_tasks,
            deterministic=deterministic,
            decoding=cache_length is not None,
        )
        if cache_length is None:
            cache_index, key_segments_BS = None, segments_BT
        else:
            cache_index, key_segments_BS = advance_cache(self, segments_BT, cache_length)
        views = self._views(segments_BT, key_segments_BS, cache_index, positions_BT)
        x_BTD = self.token_embedder(tokens_BT)
        if self.config.scale_embeddings:
            x_BTD *= jnp.asarray(math.sqrt(self.config.emb_dim), x_BTD.dtype)
        projections = self.config.projections
        shapes = dict.fromkeys(projections, tokens_BT.shape)
        state = (x_BTD, initial_carry(self.adapter, projections, shapes, self.config.dtype))
        windowed = self.config.windowed_layers
        if self.config.scan_layers:
            are_windowed_L = jnp.asarray(windowed) if len(views) > 1 else None
            state, _ = self.layers(
                state, tuple(views.values()), are_windowed_L, context, cache_index
            )
        else:
            for block, is_windowed in zip(self.layers, windowed, strict=True):
                state, _ = block(state, (views[is_windowed],), None, context, cache_index)
        return self.final_norm(state[0])

    def _views(self, segments_BT, key_segments_BS, cache_index, positions_BT):
        """{whether windowed: LayerView} of the kinds of layers there are, the global one first."""
        config = self.config
        start = 0 if cache_index is None else cache_index
        views = {}
        for is_windowed in sorted(set(config.windowed_layers)):
            window = config.sliding_window if is_windowed else None
            theta, scaling = config.rope_theta, config.rope_scaling
            if is_windowed and config.local_rope_theta is not None:
                theta, scaling = config.local_rope_theta, None
            views[is_windowed] = LayerView(
                attention_mask(segments_BT, key_segments_BS, start, window),
                rotary_tables(positions_BT, config.head_dim, theta, scaling),
            )
        return views

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Projects activations (..., D) onto the vocabulary, (..., V), in float32."""
        if self.config.tie_embeddings:
            logits_BTV = self.token_embedder.attend(x_BTD)
        else:
            logits_BTV = self.lm_head(x_BTD)
        logits_BTV = constrain(logits_BTV, "batch", *[None] * (logits_BTV.ndim - 2), "vocab")
        return soft_cap(logits_BTV.astype(jnp.float32), self.config.final_softcap)


def prompt_mask(segments_BT: jax.Array, loss_weights_BT: jax.Array | None) -> jax.Array:
    """True (B, T) at the tokens of prompts: the real ones that are not a target.

    A token is a target if the position before it, in the same example, carries a loss. Without weights all real tokens
    are the prompt's.
    """
    valid_BT = segments_BT > 0
    if loss_weights_BT is None:
        return valid_BT
    before_BT = jnp.pad(loss_weights_BT[:, :-1] != 0, ((0, 0), (1, 0)))
    same_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0)))
    return valid_BT & ~(before_BT & same_BT)


def attention_mask(
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    query_start: Any,
    window: int | None = None,
) -> jax.Array:
    """True (B, T, S) where a key is of the query's segment, is no padding, and stands at or before the query.

    `query_start` is the slot of the first query among the keys. With a window, only the query's own slot and the
    `window - 1` before it are seen; a segment's tokens stand in adjacent slots, so that distances are those of positions.
    """
    query_slots_T = query_start + jnp.arange(query_segments_BT.shape[1])
    distances_TS = query_slots_T[:, None] - jnp.arange(key_segments_BS.shape[1])
    seen_TS = distances_TS >= 0
    if window is not None:
        seen_TS &= distances_TS < window
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return seen_TS & same_BTS & (key_segments_BS > 0)[:, None, :]
