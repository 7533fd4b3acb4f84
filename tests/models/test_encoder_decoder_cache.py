"""Decoding token by token with a cache against one pass over the whole."""

import functools

import jax
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, ResLoRAConfig, SiRAConfig
from sira_jax.models import EncoderDecoder
from tests.tiny_t5 import t5_batch, t5_config, t5_params

ALL = ("encoder/.*", "decoder/.*")
SIRA = SiRAConfig(
    expert_dropout_rate=0.0,
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    capacity_factor=None,
    router_init_std=1.0,
    targets=("encoder/mlp/wo", "decoder/encoder_decoder_attention/(key|value)", "decoder/mlp/wo"),
)
LENGTH = 6
# Rows of unequal inputs, whose padding is token 0.
BATCH = t5_batch([[(9, LENGTH)], [(4, LENGTH)]], (9, LENGTH))
ENCODER = ("encoder_input_tokens",)


@functools.partial(jax.jit, static_argnums=(0, 4))
def step(model, params, cache, batch, cache_length):
    variables = {"params": params} if cache is None else {"params": params, "cache": cache}
    y, changed = model.apply(
        variables, batch, cache_length=cache_length, mutable=["cache", "metrics"]
    )
    return y, changed["cache"], changed.get("metrics", {})


def decode(model, params, batch, prefix=1, cache_length=LENGTH + 2):
    """Logits of all tokens: the first `prefix` in one call, then one by one; caches and metrics of each call."""
    tokens = batch["decoder_input_tokens"]
    first = {name: batch[name] for name in ENCODER} | {"decoder_input_tokens": tokens[:, :prefix]}
    if "decoder_segment_ids" in batch:
        first["decoder_segment_ids"] = batch["decoder_segment_ids"][:, :prefix]
    y, cache, metrics = step(model, params, None, first, cache_length)
    parts, caches, all_metrics = [y], [cache], [metrics]
    for place in range(prefix, tokens.shape[1]):
        later = {
            "decoder_input_tokens": tokens[:, place : place + 1],
            "decoder_positions": np.full((len(tokens), 1), place, np.int32),
        }
        y, cache, metrics = step(model, params, cache, later, cache_length)
        parts.append(y)
        caches.append(cache)
        all_metrics.append(metrics)
    return np.concatenate(parts, axis=1), caches, all_metrics


def in_one_pass(model, params, batch):
    names = (*ENCODER, "decoder_input_tokens", "decoder_segment_ids")
    given = {name: batch[name] for name in names if name in batch}
    return np.asarray(jax.jit(model.apply)({"params": params}, given))


@pytest.mark.parametrize(
    ("changes", "adapter", "prefix"),
    [
        ({"scan_layers": False, "relpos_per_layer": True}, LoRAConfig(rank=2, targets=ALL), 3),
        ({"relpos_per_layer": True, "tie_embeddings": True}, SIRA, 1),
        ({}, ResLoRAConfig(rank=2, connection="middle", targets=ALL), 2),
    ],
    ids=["lora apart", "sira", "reslora"],
)
def test_token_by_token_is_one_pass(changes, adapter, prefix):
    model = EncoderDecoder(t5_config(**changes), adapter)
    params = t5_params(model)
    batch = {name: BATCH[name] for name in (*ENCODER, "decoder_input_tokens")}
    got, _, _ = decode(model, params, batch, prefix)
    np.testing.assert_allclose(got, in_one_pass(model, params, batch), rtol=1e-4, atol=1e-4)


def test_rows_may_start_with_padding():
    model = EncoderDecoder(t5_config())
    params = t5_params(model)
    tokens = BATCH["decoder_input_tokens"].copy()
    segments = np.ones_like(tokens)
    tokens[1] = [7, 7, *tokens[1, :-2]]
    segments[1, :2] = 0
    batch = {
        "encoder_input_tokens": BATCH["encoder_input_tokens"],
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": segments,
    }
    got, _, _ = decode(model, params, batch, prefix=3)
    batch = {name: BATCH[name] for name in (*ENCODER, "decoder_input_tokens")}
    expected = in_one_pass(model, params, batch)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1, 2:], expected[1, :-2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_axes_of_the_cache(scan_layers):
    """Arrays under scanned layers have the layers first and the rows second, all others the rows first."""
    model = EncoderDecoder(t5_config(scan_layers=scan_layers))
    batch = {name: BATCH[name] for name in (*ENCODER, "decoder_input_tokens")}
    shapes = jax.eval_shape(
        lambda params: model.apply({"params": params}, batch, cache_length=8, mutable=["cache"]),
        t5_params(model),
    )[1]["cache"]
    flat = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    expected = {
        "decoder/index": (),
        "decoder/segment_ids": (2, 8),
        "decoder/encoder_segment_ids": (2, 9),
    }
    layers = {"layers": (2,)} if scan_layers else {"layers_0": (), "layers_1": ()}
    for layer, first in layers.items():
        for name in ("cached_key", "cached_value"):
            expected[f"decoder/{layer}/self_attention/{name}"] = (*first, 2, 8, 3, 4)
            expected[f"decoder/{layer}/encoder_decoder_attention/{name}"] = (*first, 2, 9, 3, 4)
    assert flat == expected


def test_routers_see_each_token_once_and_no_padding():
    model = EncoderDecoder(t5_config(), SIRA)
    params = t5_params(model)
    batch = {name: BATCH[name] for name in (*ENCODER, "decoder_input_tokens")}
    _, caches, metrics = decode(model, params, batch)
    first, *later = metrics
    assert len(later) == LENGTH - 1

    def tokens(metrics, *path):
        for name in path:
            metrics = metrics[name]
        return metrics["adapter"]["router"][0].tokens

    # 9 and 4 of the inputs' 18 places are tokens.
    np.testing.assert_array_equal(tokens(first["encoder"], "layers", "mlp", "wo"), [13] * 3)
    cross = ("layers", "encoder_decoder_attention")
    for name in ("key", "value"):
        np.testing.assert_array_equal(tokens(first["decoder"], *cross, name), [13] * 2)
    np.testing.assert_array_equal(tokens(first["decoder"], "layers", "mlp", "wo"), [2] * 2)
    for step_metrics in later:
        assert set(step_metrics) == {"decoder"}
        assert set(step_metrics["decoder"]["layers"]) == {"mlp"}
        np.testing.assert_array_equal(
            tokens(step_metrics["decoder"], "layers", "mlp", "wo"), [2, 2]
        )
    kept = [cache["decoder"]["layers"]["encoder_decoder_attention"] for cache in caches]
    for cache in kept[1:]:
        jax.tree.map(np.testing.assert_array_equal, cache, kept[0])


def test_padding_of_the_input_changes_nothing_in_decoding():
    model = EncoderDecoder(t5_config(), SIRA)
    params = t5_params(model)
    batch = {name: BATCH[name][1:] for name in (*ENCODER, "decoder_input_tokens")}
    tokens = batch["encoder_input_tokens"]
    short = dict(batch, encoder_input_tokens=tokens[:, :4])
    expected = in_one_pass(model, params, short)
    shifted = dict(batch, encoder_input_tokens=np.roll(tokens, 3, axis=1))
    for padded in (batch, shifted):
        got, _, _ = decode(model, params, padded)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
