"""FLOPs and bytes of a step: loops count in full, and few layers give those of many."""

import functools

import jax
import jax.numpy as jnp
import pytest

from scripts import compare_costs
from sira_jax.models import DecoderConfig
from tests.scripts.comparisons import experiment

B, T = 4, 16
NAMES = ("one", "two")
# Multiply-adds of the projections of a layer.
PROJECTIONS = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 20


def model(layers):
    return DecoderConfig(
        vocab_size=32,
        emb_dim=16,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=20,
    )


@functools.cache
def analyse(layers=2, method="lora", **train):
    shapes = dict.fromkeys(
        ("decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids", "task_ids"),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    batch = shapes | {"decoder_loss_weights": jax.ShapeDtypeStruct((B, T), jnp.float32)}
    train = {"num_steps": 4} | train
    return compare_costs.analyse(experiment(method, train=train), model(layers), batch, NAMES)


@pytest.mark.slow
def test_few_layers_give_the_cost_of_many(monkeypatch):
    apart = analyse(3, "sira")
    assert apart["extrapolated"] == 0
    analyse.cache_clear()
    for name, layers in (("_MOST_LAYERS", 2), ("_FEW", 1), ("_MORE", 2)):
        monkeypatch.setattr(compare_costs, name, layers)
    extrapolated = analyse(3, "sira")
    analyse.cache_clear()
    assert extrapolated["extrapolated"] == 1
    for name in ("flops_per_token", "bytes_per_token"):
        assert extrapolated[name] == pytest.approx(apart[name], rel=2e-3)


def test_a_layer_costs_its_products_forward_and_backward():
    more, few = analyse(3)["flops_per_token"], analyse()["flops_per_token"]
    # Forward and the gradient of the input: the frozen kernels have none of their own. The rest is LoRA of rank 4 (3 times
    # its forward pass), attention over 16 positions, norms and activations.
    lora = 2 * 4 * (16 * 7 + 16 + 8 + 8 + 16 + 20 + 20 + 16 + 4)
    attention = 2 * 2 * T * 16
    products = 2 * (2 * PROJECTIONS) + 3 * lora + 3 * attention
    assert products < more - few < 1.6 * products


@pytest.mark.slow
def test_chunks_and_microbatches_count_in_full():
    whole = analyse()
    assert whole["extrapolated"] == 0
    assert analyse(loss_chunk_size=8, accumulation_steps=2) == whole
