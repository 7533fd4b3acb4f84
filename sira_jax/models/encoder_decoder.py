"""Encoder-decoder transformer of the T5 family with adapters on its projections.

With layers apart, names and shapes of the parameters are those of T5X's minimal T5.

Axis letters: B batch, S length of the encoder's input, T length of the decoder's in this call, K slots of the decoder's cache
(T outside decoding), D width, V vocabulary.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters import AdapterConfig, AdapterContext, LayerLink
from sira_jax.models.decoder import attention_mask, prompt_mask
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig
from sira_jax.models.layers import RMSNorm, TokenEmbed
from sira_jax.models.stacking import advance_cache, initial_carry, make_blocks, run_blocks
from sira_jax.models.t5_layers import T5MLP, CrossAttention, RelativePositionBias, SelfAttention
from sira_jax.placement import constrain

Batch = Mapping[str, jax.Array]

_CROSS = "decoder/encoder_decoder_attention"
# The decoder's projections that read the encoder's tokens.
_READ_ENCODED = (f"{_CROSS}/key", f"{_CROSS}/value")


class _Block(nn.Module):
    """Base of both blocks; every part is pre-norm: x + part(norm(x))."""

    config: EncoderDecoderConfig
    adapter: AdapterConfig | None

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.config.param_dtype, name=name)

    def enter(self, x_BTD, context: AdapterContext, link: LayerLink) -> AdapterContext:
        """The context of this block's projections, its block module run on the block's input."""
        block_module = self.adapter and self.adapter.make_block_module()
        block = None if block_module is None else block_module(x_BTD, context)
        return context.replace(block=block, link=link)

    def bias(self, shared_1HTS, bidirectional, query_start, num_queries, num_keys):
        """The stack's bias of relative positions, or that of the block's own table where there is none."""
        if shared_1HTS is not None:
            return shared_1HTS
        own = RelativePositionBias(self.config, bidirectional, name="relpos_bias")
        return own(query_start, num_queries, num_keys)


class EncoderBlock(_Block):
    """Self-attention, MLP."""

    @nn.compact
    def __call__(self, state, mask_BSS, bias_1HSS, context):
        """`state` is (x_BSD, carry), the carry being what adapters hand from layer to layer (see `LayerLink`)."""
        x_BSD, carry = state
        parts = (self.config, self.adapter, "encoder/")
        link = LayerLink(carry)
        context = self.enter(x_BSD, context, link)
        bias_1HSS = self.bias(bias_1HSS, True, 0, *mask_BSS.shape[1:])
        h_BSD = self.norm("pre_attention_layer_norm")(x_BSD)
        x_BSD += SelfAttention(*parts, name="attention")(h_BSD, mask_BSS, bias_1HSS, context)
        x_BSD += T5MLP(*parts, name="mlp")(self.norm("pre_mlp_layer_norm")(x_BSD), context)
        return (x_BSD, carry | link.next), None


class DecoderBlock(_Block):
    """Causal self-attention, attention to the encoder, MLP.

    The adapters on the keys and values of the attention to the encoder see the encoder's tokens, and nothing of the block
    module, which looks at the decoder's.
    """

    @nn.compact
    def __call__(
        self,
        state,
        encoded_BSD,
        mask_BTK,
        cross_mask_BTS,
        bias_1HTK,
        context,
        encoder_context,
        cache_index,
    ):
        """`state` as in EncoderBlock; `encoded_BSD` and `encoder_context` are None in later calls of decoding."""
        x_BTD, carry = state
        parts = (self.config, self.adapter, "decoder/")
        link = LayerLink(carry)
        context = self.enter(x_BTD, context, link)
        encoder_context = encoder_context and encoder_context.replace(link=link)
        start = 0 if cache_index is None else cache_index
        bias_1HTK = self.bias(bias_1HTK, False, start, *mask_BTK.shape[1:])
        h_BTD = self.norm("pre_self_attention_layer_norm")(x_BTD)
        attention = SelfAttention(*parts, name="self_attention")
        x_BTD += attention(h_BTD, mask_BTK, bias_1HTK, context, cache_index)
        h_BTD = self.norm("pre_cross_attention_layer_norm")(x_BTD)
        attention = CrossAttention(*parts, name="encoder_decoder_attention")
        x_BTD += attention(h_BTD, encoded_BSD, cross_mask_BTS, context, encoder_context)
        x_BTD += T5MLP(*parts, name="mlp")(self.norm("pre_mlp_layer_norm")(x_BTD), context)
        return (x_BTD, carry | link.next), None


class EncoderStack(nn.Module):
    """All blocks of the encoder and its final norm."""

    config: EncoderDecoderConfig
    adapter: AdapterConfig | None

    def setup(self):
        config = self.config
        if not config.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(config, bidirectional=True)
        self.layers = make_blocks(EncoderBlock, config.num_encoder_layers, config, self.adapter)
        self.encoder_norm = RMSNorm(config.norm_eps, config.param_dtype)

    def __call__(self, x_BSD: jax.Array, context: AdapterContext) -> jax.Array:
        """Embedded tokens (B, S, D) to what the decoder reads (B, S, D)."""
        config, length = self.config, x_BSD.shape[1]
        segments_BS = context.segment_ids_BT
        bias = None if config.relpos_per_layer else self.relpos_bias(0, length, length)
        projections = config.stacks[0].projections
        shapes = dict.fromkeys(projections, x_BSD.shape[:2])
        carry = initial_carry(self.adapter, projections, shapes, config.dtype)
        mask_BSS = segment_mask(segments_BS, segments_BS)
        x_BSD, _ = run_blocks(self.layers, (x_BSD, carry), mask_BSS, bias, context)
        return self.encoder_norm(x_BSD)


class DecoderStack(nn.Module):
    """All blocks of the decoder, its final norm, and the logits where they have their own matrix."""

    config: EncoderDecoderConfig
    adapter: AdapterConfig | None

    def setup(self):
        config = self.config
        if not config.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(config, bidirectional=False)
        self.layers = make_blocks(DecoderBlock, config.num_decoder_layers, config, self.adapter)
        self.decoder_norm = RMSNorm(config.norm_eps, config.param_dtype)
        if not config.tie_embeddings:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            self.logits_dense = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=jnp.float32,
                param_dtype=config.param_dtype,
                kernel_init=nn.with_logical_partitioning(init, ("embed", "vocab")),
            )

    def __call__(
        self,
        x_BTD: jax.Array,
        encoded_BSD: jax.Array | None,
        context: AdapterContext,
        encoder_context: AdapterContext | None,
        cache_length: int | None,
    ) -> jax.Array:
        """Embedded tokens (B, T, D) to final normalised activations (B, T, D).

        In later calls of decoding, `encoded_BSD` and `encoder_context` are None.
        """
        config, (batch, length, _) = self.config, x_BTD.shape
        segments_BT = key_segments_BK = context.segment_ids_BT
        cache_index, start = None, 0
        if cache_length is not None:
            cache_index, key_segments_BK = advance_cache(self, segments_BT, cache_length)
            start = cache_index
        encoder_segments_BS = self._encoder_segments(encoder_context, cache_length is not None)
        bias = None
        if not config.relpos_per_layer:
            bias = self.relpos_bias(start, length, key_segments_BK.shape[1])
        shapes = dict.fromkeys(config.stacks[1].projections, (batch, length))
        for path in _READ_ENCODED:
            if encoded_BSD is None:
                del shapes[path]
            else:
                shapes[path] = encoded_BSD.shape[:2]
        carry = initial_carry(self.adapter, config.projections, shapes, config.dtype)
        x_BTD, _ = run_blocks(
            self.layers,
            (x_BTD, carry),
            encoded_BSD,
            attention_mask(segments_BT, key_segments_BK, start),
            segment_mask(segments_BT, encoder_segments_BS),
            bias,
            context,
            encoder_context,
            cache_index,
        )
        return self.decoder_norm(x_BTD)

    def _encoder_segments(self, encoder_context, decoding):
        if encoder_context is None:
            return self.get_variable("cache", "encoder_segment_ids")
        if decoding:
            self.put_variable("cache", "encoder_segment_ids", encoder_context.segment_ids_BT)
        return encoder_context.segment_ids_BT

    def project(self, x_BTD: jax.Array) -> jax.Array:
        """The logits' own matrix on activations (..., D), (..., V) in float32."""
        return self.logits_dense(x_BTD)


class EncoderDecoder(nn.Module):
    """Token ids to logits.

    A batch is a mapping with the names that SeqIO and T5X use. Of the encoder, each (B, S): `encoder_input_tokens`, and
    optionally `encoder_segment_ids` (0 is padding, 1.. the examples packed in a row; default 1 at the tokens that are not 0,
    the pad token) and `encoder_task_ids`. Of the decoder, each (B, T): `decoder_input_tokens`, and optionally
    `decoder_segment_ids` (default 1 where `decoder_target_tokens` is not 0, or all 1 without those), `task_ids` and
    `decoder_loss_weights` (see Decoder). Either both or none of the two have segment ids; an example attends within its
    segment, of the own stream and of the encoder's. `adapter_ids` is (B,). `encoder_positions` and `decoder_positions` may be
    there and change nothing: T5 knows distances alone, and within a segment those of slots are those of positions.

    Collections and RNG streams: as Decoder.

    Attributes:
      config: sizes.
      adapter: adapter for the projections it targets, or None for the frozen model.
      num_tasks: how many tasks the router's metrics tell apart; 0 for none.
    """

    config: EncoderDecoderConfig
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
                nn.initializers.normal(1.0), ("vocab", "embed")
            ),
        )
        self.encoder = EncoderStack(config, self.adapter)
        self.decoder = DecoderStack(config, self.adapter)

    @nn.nowrap
    def init_batch(self) -> dict[str, jax.Array]:
        """The smallest batch to initialise with: a model's parameters do not depend on it."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}

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
        """Final normalised activations of the decoder (B, T, D), before the projection onto the vocabulary.

        `progress` is the share of the training that is done, for adapters with a schedule.

        With `cache_length`, the decoder's keys and values go to a cache of that many slots (collection `cache`, mutable),
        and each row is one example. The first call has the encoder's arrays and the start of the decoder's input; it runs the
        encoder and keeps the keys and values that the decoder takes from it. Later calls go on where the last one ended
        and have none of the encoder's arrays. The decoder's rows may start with padding (segment id 0).
        """
        common = AdapterContext(
            progress=progress,
            adapter_ids_B=batch.get("adapter_ids"),
            num_tasks=self.num_tasks,
            deterministic=deterministic,
        )
        encoded_BSD = encoder_context = None
        if "encoder_input_tokens" in batch:
            encoder_context = self._encoder_context(common, batch)
            x_BSD = self.token_embedder(batch["encoder_input_tokens"])
            encoded_BSD = self.encoder(x_BSD, encoder_context)
        context = self._decoder_context(common, batch, cache_length is not None)
        x_BTD = self.token_embedder(batch["decoder_input_tokens"])
        return self.decoder(x_BTD, encoded_BSD, context, encoder_context, cache_length)

    def _encoder_context(self, common: AdapterContext, batch: Batch) -> AdapterContext:
        """`decoding` stays off: no later call continues the encoder."""
        tokens_BS = batch["encoder_input_tokens"]
        segments_BS = batch.get("encoder_segment_ids")
        if segments_BS is None:
            segments_BS = (tokens_BS != 0).astype(jnp.int32)
        return common.replace(
            valid_BT=segments_BS > 0,
            segment_ids_BT=segments_BS,
            prompt_BT=segments_BS > 0,
            task_ids_BT=batch.get("encoder_task_ids") if self.num_tasks else None,
        )

    def _decoder_context(
        self, common: AdapterContext, batch: Batch, decoding: bool
    ) -> AdapterContext:
        tokens_BT = batch["decoder_input_tokens"]
        segments_BT = batch.get("decoder_segment_ids")
        targets_BT = batch.get("decoder_target_tokens")
        if segments_BT is None and targets_BT is not None and not decoding:
            segments_BT = (targets_BT > 0).astype(jnp.int32)
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        return common.replace(
            valid_BT=segments_BT > 0,
            segment_ids_BT=segments_BT,
            prompt_BT=prompt_mask(segments_BT, batch.get("decoder_loss_weights")),
            task_ids_BT=batch.get("task_ids") if self.num_tasks else None,
            decoding=decoding,
        )

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Projects activations (..., D) onto the vocabulary, (..., V), in float32."""
        x_BTD = x_BTD.astype(jnp.float32)
        if self.config.tie_embeddings:
            table_VD = self.token_embedder.embedding.astype(jnp.float32)
            logits_BTV = x_BTD / jnp.sqrt(jnp.float32(self.config.emb_dim)) @ table_VD.T
        else:
            logits_BTV = self.decoder.project(x_BTD)
        return constrain(logits_BTV, "batch", *[None] * (logits_BTV.ndim - 2), "vocab")


def segment_mask(query_segments_BT: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
    """True (B, T, S) where a key is of the query's segment and is no padding."""
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return same_BTS & (key_segments_BS > 0)[:, None, :]
