"""This package's models as T5X's, for its gin files: an encoder-decoder and a decoder-only one.

The base has no dropout; an adapter's own is its `dropout_rate`.

Axis letters: B batch, L length of the decoder's input, T tokens of a prompt with padding, V vocabulary.
"""

import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio

from sira_jax.errors import check
from sira_jax.models import Decoder, EncoderDecoder
from sira_jax.t5x_integration import rows
from sira_jax.t5x_integration.adapted import MEAN_OVER_TARGETS, Adapted, Batch
from sira_jax.t5x_integration.engine import models


class AdapterEncoderDecoderModel(Adapted, models.EncoderDecoderModel):
    """An EncoderDecoder under T5X.

    Args:
      module: the model with its adapter.
      input_vocabulary, output_vocabulary: SeqIO's.
      optimizer_def: see `optimizer.adapter_optimizer`.
      num_steps: steps of the whole training, for adapters with a schedule.
      seed: of the adapter's fresh parameters and of all random keys in training.
      adapter_path: adapter folder to start from instead of a fresh adapter.
      decode_fn, label_smoothing, z_loss, feature_converter_cls, default_decoder_params: T5X's.
      loss_normalizing_factor: T5X's; the default is native training's, the mean over the target tokens of the batch.
    """

    def __init__(
        self,
        module: EncoderDecoder,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        num_steps: int,
        seed: int = 0,
        adapter_path: str | os.PathLike | None = None,
        decode_fn: Callable = models.decoding.beam_search,
        feature_converter_cls: Callable | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: Any = MEAN_OVER_TARGETS,
        default_decoder_params: Any = None,
    ):
        self.seed, self.num_steps, self.adapter_path = seed, num_steps, adapter_path
        super().__init__(
            module=module,
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            loss_normalizing_factor=loss_normalizing_factor,
            default_decoder_params=default_decoder_params,
        )
        self._check(EncoderDecoder, seed, num_steps)

    def to_module(self, batch: Batch) -> dict[str, jax.Array]:
        """The arrays of T5X's batch that the module reads."""
        names = (
            "encoder_input_tokens",
            "encoder_segment_ids",
            "decoder_input_tokens",
            "decoder_target_tokens",
            "decoder_segment_ids",
            "decoder_loss_weights",
        )
        return {name: batch[name] for name in names if name in batch}

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Batch,
        rng: jax.Array | None = None,
        decoder_params: MutableMapping[str, Any] | None = None,
        return_all_decodes: bool | None = None,
        num_decodes: int | None = None,
        prompt_with_targets: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Decodes a batch with `decode_fn`; arguments and results as of T5X's EncoderDecoderModel."""
        defaults = self._default_decoder_params
        if return_all_decodes is None:
            return_all_decodes = defaults.return_all_decodes
        num_decodes = defaults.num_decodes if num_decodes is None else num_decodes
        prompts_BL = batch["decoder_input_tokens"]
        if prompt_with_targets:
            # The search takes a token that is not 0 as given, and would stop at an end of sequence.
            prompts_BL = prompts_BL * (prompts_BL != self.output_vocabulary.eos_id)
        else:
            prompts_BL = jnp.zeros_like(prompts_BL)
        size, length = prompts_BL.shape
        # One slot for each call of the search, whose last may lie one beyond the length.
        slots = length + 2
        first = {
            "encoder_input_tokens": batch["encoder_input_tokens"],
            "decoder_input_tokens": jnp.zeros((size, 1), prompts_BL.dtype),
        }
        state = rows.start(self.module, params, first, jnp.ones(size, jnp.int32), slots)

        def next_logits(decoding_state):
            return self._compute_logits_from_slice(decoding_state, params, slots)

        decodes, scores = self._decode_fn(
            inputs=prompts_BL,
            cache=state,
            tokens_to_logits=next_logits,
            num_decodes=num_decodes,
            cache_offset=0,
            **search_options(decoder_params, rng, self.output_vocabulary),
        )
        if return_all_decodes:
            return decodes, {"scores": scores}
        return decodes[:, -1], {"scores": scores[:, -1]}


class AdapterDecoderOnlyModel(Adapted, models.DecoderOnlyModel):
    """A Decoder under T5X. Arguments as of AdapterEncoderDecoderModel."""

    def __init__(
        self,
        module: Decoder,
        vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        num_steps: int,
        seed: int = 0,
        adapter_path: str | os.PathLike | None = None,
        decode_fn: Callable = models.decoding.temperature_sample,
        feature_converter_cls: Callable | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: Any = MEAN_OVER_TARGETS,
    ):
        self.seed, self.num_steps, self.adapter_path = seed, num_steps, adapter_path
        super().__init__(
            module=module,
            vocabulary=vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            loss_normalizing_factor=loss_normalizing_factor,
        )
        self._check(Decoder, seed, num_steps)

    def to_module(self, batch: Batch) -> dict[str, jax.Array]:
        """The arrays of T5X's batch that the module reads; without segment ids, targets of 0 are padding."""
        segments_BL = batch.get("decoder_segment_ids")
        if segments_BL is None:
            segments_BL = (batch["decoder_target_tokens"] > 0).astype(jnp.int32)
        names = ("decoder_input_tokens", "decoder_positions", "decoder_loss_weights")
        found = {name: batch[name] for name in names if name in batch}
        return found | {"decoder_segment_ids": segments_BL}

    def _compute_kv_cache(
        self, params: Any, inputs: jax.Array, causal_attention_mask: jax.Array
    ) -> tuple[Any, jax.Array]:
        """(decoding state after the prompts, place of each prompt's last token).

        A prompt is the token 0 that SeqIO puts first and the inputs. Rows are shifted to end in the same slot.
        """
        del causal_attention_mask
        length = inputs.shape[1]
        last_B = jnp.sum(inputs[:, 1:] != 0, axis=-1)
        positions_BT = jnp.arange(length) - (length - 1 - last_B[:, None])
        is_prompt_BT = positions_BT >= 0
        positions_BT = jnp.where(is_prompt_BT, positions_BT, 0)
        tokens_BT = jnp.take_along_axis(inputs, positions_BT, axis=1)
        prompts = {
            "decoder_input_tokens": jnp.where(is_prompt_BT, tokens_BT, 0),
            "decoder_segment_ids": is_prompt_BT.astype(jnp.int32),
            "decoder_positions": positions_BT,
        }
        return rows.start(self.module, params, prompts, last_B + 1, _slots(length)), last_B

    def _compute_logits_from_slice(
        self, decoding_state: Any, params: Any, max_decode_length: int
    ) -> tuple[jax.Array, Any]:
        return super()._compute_logits_from_slice(decoding_state, params, _slots(max_decode_length))


def _slots(length: int) -> int:
    """Slots for prompts and all that may follow: a row with an empty prompt is extended `length` times, and once more."""
    return 2 * length + 2


def search_options(
    decoder_params: Mapping[str, Any] | None, rng: jax.Array | None, vocabulary: seqio.Vocabulary
) -> dict[str, Any]:
    """Arguments of T5X's search functions: `decoder_params`, with the key and the end of sequence filled in.

    Raises:
      ConfigError: if there are two keys.
    """
    options = dict(decoder_params or {})
    if rng is not None:
        known = options.get("decode_rng")
        check(known is None, "decoder_params.decode_rng", known, "None where `rng` is given")
        options["decode_rng"] = rng
    options.setdefault("eos_id", vocabulary.eos_id or 1)
    return options
