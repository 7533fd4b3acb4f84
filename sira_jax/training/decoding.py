"""Generation with a key/value cache: greedy, sampling and beam search over batches of prompts.

A decoder-only model reads prompts of unequal length padded on the left, so that all rows write their next token to the same
slot of the cache. A model with an encoder reads the prompt there, and its decoder starts with one token.

Axis letters: B prompts, N beams, R = B * N rows, T length of the padded prompts, M most new tokens, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils

from sira_jax.adapters.base import STACKED
from sira_jax.errors import DataError, check
from sira_jax.models import DecoderConfig, EncoderDecoderConfig, Model, ModelConfig
from sira_jax.training.config import DecodeConfig

# Finite, so that adding two of them or scaling by a penalty gives no NaN.
NEVER = -1e9


@struct.dataclass
class _Search:
    """State of the loop. Scores and `done` are (R,); `tokens_RM` holds what was generated, padded with `pad_id`.

    `adapter_ids_R` is each row's adapter of a set, or None without one.
    """

    count: jax.Array
    cache: Any
    logits_RV: jax.Array
    positions_R: jax.Array
    tokens_RM: jax.Array
    done_R: jax.Array
    scores_R: jax.Array
    adapter_ids_R: jax.Array | None


def left_pad(prompts: Sequence[Sequence[int]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Packs prompts into arrays (B, length) with padding on the left.

    Returns decoder_input_tokens, decoder_segment_ids (0 at padding) and decoder_positions (0 at each first token).

    Raises:
      DataError: if a prompt is empty or longer than `length`.
    """
    tokens_BT = np.full((len(prompts), length), pad_id, np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    positions_BT = np.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= length:
            raise DataError(f"prompt {row} has {len(prompt)} tokens: 1 to {length} are possible")
        start = length - len(prompt)
        tokens_BT[row, start:] = prompt
        segments_BT[row, start:] = 1
        positions_BT[row, start:] = np.arange(len(prompt))
    return {
        "decoder_input_tokens": tokens_BT,
        "decoder_segment_ids": segments_BT,
        "decoder_positions": positions_BT,
    }


def for_encoder(
    prompts: Sequence[Sequence[int]], length: int, pad_id: int, start_id: int
) -> dict[str, np.ndarray]:
    """Packs prompts into arrays (B, length) of the encoder, padded on the right, and the decoder's first token (B, 1).

    Raises:
      DataError: if a prompt is empty or longer than `length`.
    """
    left = left_pad(prompts, length, pad_id)
    # The same rows, turned so that padding comes last.
    order_BT = np.argsort(left["decoder_segment_ids"] == 0, axis=1, kind="stable")
    encoder = {
        name.replace("decoder", "encoder"): np.take_along_axis(array, order_BT, axis=1)
        for name, array in left.items()
    }
    first_B1 = np.zeros((len(prompts), 1), np.int32)
    return encoder | {
        "decoder_input_tokens": first_B1 + start_id,
        "decoder_segment_ids": first_B1 + 1,
        "decoder_positions": first_B1,
    }


def _first_batch(
    config: ModelConfig, prompts: Sequence[Sequence[int]], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """What the first call of decoding reads, by the kind of model; after it each row writes its next token."""
    kinds = {
        DecoderConfig: lambda: left_pad(prompts, length, pad_id),
        EncoderDecoderConfig: lambda: for_encoder(prompts, length, pad_id, config.decoder_start_id),
    }
    return kinds[type(config)]()


def _longest_prompt(config: ModelConfig, new_tokens: int) -> int:
    """Tokens of the longest prompt that leaves room for the new ones: all positions where an encoder reads it."""
    taken = {DecoderConfig: new_tokens, EncoderDecoderConfig: 0}[type(config)]
    return config.max_positions - taken


def filter_logits(logits_RV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets to NEVER all but the `top_k` largest logits (0: all) and the smallest set of probability `top_p`.

    The most likely token always stays. Ties at a border stay in. arXiv 1805.04833, 1904.09751.
    """
    if top_k and top_k < logits_RV.shape[-1]:
        least = jax.lax.top_k(logits_RV, top_k)[0][:, -1:]
        logits_RV = jnp.where(logits_RV < least, NEVER, logits_RV)
    if top_p < 1.0:
        sorted_RV = jnp.sort(logits_RV, axis=-1, descending=True)
        probs_RV = jax.nn.softmax(sorted_RV, axis=-1)
        before_RV = jnp.cumsum(probs_RV, axis=-1) - probs_RV
        # A token stays if those before it do not reach top_p yet.
        least = jnp.min(jnp.where(before_RV < top_p, sorted_RV, jnp.inf), axis=-1, keepdims=True)
        logits_RV = jnp.where(logits_RV < least, NEVER, logits_RV)
    return logits_RV


def _is_stop(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    if not eos_ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.any(tokens[..., None] == jnp.asarray(eos_ids), axis=-1)


def prefill(model: Model, params: Any, batch: Any, cache_length: int) -> tuple[jax.Array, Any]:
    """Runs the prompts of a batch as `left_pad` or `for_encoder` makes it: the next token's logits (B, V), and the cache.

    Only the last position's logits are computed, which left padding makes the next token's.
    """
    features_BTD, variables = model.apply(
        {"params": params}, batch, cache_length=cache_length, method="features", mutable=["cache"]
    )
    logits_BV = model.apply({"params": params}, features_BTD[:, -1], method="logits")
    return logits_BV, variables["cache"]


def _extend(
    model: Model, params: Any, search: _Search, tokens_R: jax.Array, cache_length: int
) -> _Search:
    """Feeds one token a row."""
    batch = {
        "decoder_input_tokens": tokens_R[:, None],
        "decoder_positions": search.positions_R[:, None],
    }
    if search.adapter_ids_R is not None:
        batch["adapter_ids"] = search.adapter_ids_R
    logits_RV, cache = decode_step(model, params, search.cache, batch, cache_length)
    return search.replace(
        cache=cache,
        logits_RV=logits_RV,
        positions_R=search.positions_R + 1,
        count=search.count + 1,
    )


def decode_step(
    model: Model, params: Any, cache: Any, batch: Any, cache_length: int
) -> tuple[jax.Array, Any]:
    """One step of any search: feeds one token a row and returns the next one's logits (R, V) and the cache with it.

    Args:
      model: any.
      params: all its parameters.
      cache: its collection `cache` (see `prefill`).
      batch: `decoder_input_tokens` and `decoder_positions` (R, 1), and with an `AdapterSet` `adapter_ids` (R,).
      cache_length: slots of the cache.
    """
    logits_R1V, variables = model.apply(
        {"params": params, "cache": cache}, batch, cache_length=cache_length, mutable=["cache"]
    )
    return logits_R1V[:, 0], variables["cache"]


def _map_rows(cache: Any, scanned: bool, function: Callable[[jax.Array, int], jax.Array]) -> Any:
    """Applies function(array, row axis) to the cache's arrays; under scanned layers the first axis is the layers'."""

    def apply(path, array):
        if array.ndim == 0:
            return array
        in_layers = scanned and any(entry.key == STACKED for entry in path)
        return function(array, 1 if in_layers else 0)

    return jax.tree_util.tree_map_with_path(apply, cache)


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _generate(
    model: Model,
    params: Any,
    batch: Any,
    config: DecodeConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Greedy search or sampling: (tokens_BM, scores_B), scores being summed log-probabilities of the model."""
    rows, length = batch["decoder_input_tokens"].shape
    limit = config.max_new_tokens
    logits_BV, cache = prefill(model, params, batch, length + limit)
    start = _Search(
        count=jnp.int32(0),
        cache=cache,
        logits_RV=logits_BV,
        positions_R=batch["decoder_positions"][:, -1] + 1,
        tokens_RM=jnp.full((rows, limit), pad_id, jnp.int32),
        done_R=jnp.zeros(rows, bool),
        scores_R=jnp.zeros(rows, jnp.float32),
        adapter_ids_R=batch.get("adapter_ids"),
    )

    def step(search: _Search) -> _Search:
        logits_RV = search.logits_RV
        if config.strategy == "sample":
            # The best logit at 0, so that dividing by a low temperature takes none of the kept ones below NEVER.
            best_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
            shaped_RV = (logits_RV - best_R1) / config.temperature
            shaped_RV = filter_logits(shaped_RV, config.top_k, config.top_p)
            next_R = jax.random.categorical(jax.random.fold_in(key, search.count), shaped_RV)
        else:
            next_R = jnp.argmax(logits_RV, axis=-1)
        log_probs_RV = jax.nn.log_softmax(logits_RV)
        gained_R = jnp.take_along_axis(log_probs_RV, next_R[:, None], axis=-1)[:, 0]
        next_R = jnp.where(search.done_R, pad_id, next_R).astype(jnp.int32)
        search = search.replace(
            tokens_RM=search.tokens_RM.at[:, search.count].set(next_R),
            scores_R=search.scores_R + jnp.where(search.done_R, 0.0, gained_R),
            done_R=search.done_R | _is_stop(next_R, eos_ids),
        )
        return _extend(model, params, search, next_R, length + limit)

    def goes_on(search: _Search) -> jax.Array:
        return (search.count < limit) & ~jnp.all(search.done_R)

    end = jax.lax.while_loop(goes_on, step, start)
    return end.tokens_RM, end.scores_R


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _beam_search(
    model: Model,
    params: Any,
    batch: Any,
    config: DecodeConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[jax.Array, jax.Array]:
    """Beam search: the best sequence of each prompt (tokens_BM, scores_B), by log-probability / length ** penalty.

    A finished beam keeps its place with its final score; the search ends when all beams are finished. Lengths count the
    end-of-sequence token.
    """
    batch_size, length = batch["decoder_input_tokens"].shape
    beams, limit = config.num_beams, config.max_new_tokens
    scanned = model.config.scan_layers
    logits_BV, cache = prefill(model, params, batch, length + limit)
    cache = _map_rows(cache, scanned, lambda x, axis: jnp.repeat(x, beams, axis=axis))
    rows = batch_size * beams
    ids_B = batch.get("adapter_ids")
    start = _Search(
        count=jnp.int32(0),
        cache=cache,
        logits_RV=jnp.repeat(logits_BV, beams, axis=0),
        positions_R=jnp.repeat(batch["decoder_positions"][:, -1] + 1, beams),
        tokens_RM=jnp.full((rows, limit), pad_id, jnp.int32),
        done_R=jnp.zeros(rows, bool),
        # All beams start equal: only the first may be extended, or the others would repeat it.
        scores_R=jnp.tile(jnp.asarray([0.0] + [NEVER] * (beams - 1)), batch_size),
        # A beam's parent is a beam of the same prompt, so that a row keeps its adapter.
        adapter_ids_R=None if ids_B is None else jnp.repeat(ids_B, beams),
    )
    lengths = jnp.zeros(rows, jnp.int32)

    def normalised(scores, lengths):
        return scores / jnp.maximum(lengths, 1).astype(jnp.float32) ** config.length_penalty

    def step(carry):
        search, lengths_R = carry
        vocabulary = search.logits_RV.shape[-1]
        log_probs_RV = jax.nn.log_softmax(search.logits_RV)
        # A finished beam has one continuation, padding, which costs nothing.
        only_pad_V = jnp.where(jnp.arange(vocabulary) == pad_id, 0.0, NEVER)
        log_probs_RV = jnp.where(search.done_R[:, None], only_pad_V, log_probs_RV)
        scores_RV = search.scores_R[:, None] + log_probs_RV
        new_lengths_R = lengths_R + ~search.done_R
        ranked_RV = normalised(scores_RV, new_lengths_R[:, None])
        _, picks_BN = jax.lax.top_k(ranked_RV.reshape(batch_size, -1), beams)
        first_row_B1 = jnp.arange(batch_size)[:, None] * beams
        parents_R = (first_row_B1 + picks_BN // vocabulary).reshape(rows)
        next_R = (picks_BN % vocabulary).reshape(rows).astype(jnp.int32)
        search = search.replace(
            cache=_map_rows(
                search.cache, scanned, lambda x, axis: jnp.take(x, parents_R, axis=axis)
            ),
            tokens_RM=search.tokens_RM[parents_R].at[:, search.count].set(next_R),
            scores_R=scores_RV[parents_R, next_R],
            done_R=search.done_R[parents_R] | _is_stop(next_R, eos_ids),
            positions_R=search.positions_R[parents_R],
        )
        return _extend(model, params, search, next_R, length + limit), new_lengths_R[parents_R]

    def goes_on(carry):
        return (carry[0].count < limit) & ~jnp.all(carry[0].done_R)

    end, lengths_R = jax.lax.while_loop(goes_on, step, (start, lengths))
    final_BN = normalised(end.scores_R, lengths_R).reshape(batch_size, beams)
    best_B = jnp.argmax(final_BN, axis=-1)
    tokens_BNM = end.tokens_RM.reshape(batch_size, beams, limit)
    best_BM = jnp.take_along_axis(tokens_BNM, best_B[:, None, None], axis=1)[:, 0]
    return best_BM, jnp.max(final_BN, axis=-1)


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    *,
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    adapter_ids: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt; the result ends before the end-of-sequence token.

    Prompts are decoded in batches of similar length, whose lengths and sizes are rounded up so that few programs are
    compiled; the results are in the order of `prompts` and do not depend on the batching (but sampling draws do).

    Args:
      model: any.
      params: all its parameters.
      prompts: token ids, at least one each; for an encoder with the end-of-sequence token, if it was trained so.
      config: see DecodeConfig.
      eos_ids: tokens that end a sequence.
      pad_id: any token id; it is masked.
      adapter_ids: for a model with an `AdapterSet`, the adapter of each prompt (-1 for the base alone); prompts of all
        adapters are decoded together.
      on_batch: called with the number of prompts after each batch.

    Raises:
      DataError: if a prompt is empty, or prompt and new tokens exceed the model's positions.
      ConfigError: if `adapter_ids` are not as many as the prompts, or missing for a set.
    """
    if adapter_ids is not None:
        allowed = f"one id for each of the {len(prompts)} prompts"
        check(len(adapter_ids) == len(prompts), "adapter_ids", list(adapter_ids), allowed)
    limit = _longest_prompt(model.config, config.max_new_tokens)
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens: 1 to {limit} are possible, the model having"
                f" {model.config.max_positions} positions and decode.max_new_tokens={config.max_new_tokens}"
            )
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), config.batch_size):
        chosen = order[first : first + config.batch_size]
        longest = len(prompts[chosen[-1]])
        # Multiples of 16 keep the compiled shapes few; the last batch is filled up with copies of its first prompt.
        length = min(-(-longest // 16) * 16, limit)
        size = config.batch_size if len(order) > config.batch_size else len(order)
        filled = chosen + [chosen[0]] * (size - len(chosen))
        batch = _first_batch(model.config, [prompts[i] for i in filled], length, pad_id)
        if adapter_ids is not None:
            batch["adapter_ids"] = np.asarray([adapter_ids[i] for i in filled], np.int32)
        if config.strategy == "beam":
            tokens_BM, _ = _beam_search(model, params, batch, config, eos_ids, pad_id)
        else:
            key = jax.random.fold_in(jax.random.key(config.seed), first)
            tokens_BM, _ = _generate(model, params, batch, config, eos_ids, pad_id, key)
        for index, row in zip(chosen, _on_host(tokens_BM), strict=False):
            results[index] = cut_at_stop(row.tolist(), eos_ids)
        if on_batch:
            on_batch(len(chosen))
    return results


def _on_host(x: jax.Array) -> np.ndarray:
    """The whole array, of which this process may hold a part."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def cut_at_stop(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """The tokens before the first that ends a sequence."""
    for index, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[:index]
    return tokens
