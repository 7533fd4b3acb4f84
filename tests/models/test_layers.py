"""The parts of a block against plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdapterContext, LoRAConfig
from sira_jax.errors import ConfigError
from sira_jax.models import DecoderConfig, RopeScaling
from sira_jax.models.decoder import attention_mask
from sira_jax.models.layers import (
    MLP,
    Attention,
    RMSNorm,
)
from sira_jax.models.rope import apply_rotary, rotary_frequencies, rotary_tables
from tests.models import reference
from tests.tiny import decoder_config, draw, shapes_of


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(2, 7, 8)).astype(np.float32)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_rms_norm(x, epsilon):
    scale = np.linspace(0.5, 2.0, 8).astype(np.float32)
    y = RMSNorm(epsilon).apply({"params": {"scale": scale}}, x)
    expected = [[reference.rms_norm(token, scale, epsilon) for token in row] for row in x]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_sums_in_float32():
    """256 squares of 0.1 in bfloat16 would stop growing long before their end."""
    x = jnp.full((1, 1, 4096), 0.1, jnp.bfloat16)
    y = RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(4096)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 1.0)


SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
)


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary_is_a_product_of_complex_numbers(scaling, theta):
    positions = np.asarray([[0, 1, 2, 50], [7, 0, 3, 3]])
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 12)).astype(np.float32)
    y = apply_rotary(x, rotary_tables(positions, 12, theta, scaling))
    for index in np.ndindex(2, 4, 3):
        position = positions[index[:2]]
        expected = reference.rotate(x[index].astype(np.float64), position, theta, scaling)
        np.testing.assert_allclose(y[index], expected, rtol=1e-4, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 4.0),
    gap=st.floats(0.5, 8.0),
    original=st.integers(16, 131072),
    theta=st.sampled_from([1e4, 5e5]),
)
def test_llama3_scaling_is_the_rule_by_cases(factor, low, gap, original, theta):
    scaling = RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=low + gap,
        original_max_positions=original,
    )
    got = rotary_frequencies(64, theta, scaling)
    expected = [reference.frequency(i, 64, theta, scaling) for i in range(32)]
    np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_llama3_scaling_has_all_three_cases():
    plain = np.asarray(rotary_frequencies(64, 500000.0, None), np.float64)
    scaled = np.asarray(rotary_frequencies(64, 500000.0, RopeScaling()), np.float64)
    ratio = plain / scaled
    np.testing.assert_allclose([ratio[0], ratio[-1]], [1.0, 8.0], rtol=1e-6)
    assert np.any((ratio > 1.01) & (ratio < 7.99))


def test_rotary_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(2).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(query, key):
        turned = [
            apply_rotary(v, rotary_tables(np.asarray([[p]]), 8, 10000.0))
            for v, p in ((q, query), (k, key))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert math.isclose(score(5, 2), score(45, 42), abs_tol=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


MASKS = {
    "one example": np.ones((2, 7), np.int32),
    "packed": np.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 3, 3, 3, 3]], np.int32),
    "padded": np.asarray([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 2, 2, 0]], np.int32),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_mask_cell_by_cell(name):
    segments = MASKS[name]
    mask = np.asarray(attention_mask(segments, segments, 0))
    for row, t, s in np.ndindex(2, 7, 7):
        visible = s <= t and segments[row, s] == segments[row, t] != 0
        assert mask[row, t, s] == visible


def test_attention_mask_of_a_cache_starts_at_the_query():
    keys = np.asarray([[0, 1, 1, 1, 0]], np.int32)
    mask = np.asarray(attention_mask(np.ones((1, 2), np.int32), keys, 2))
    np.testing.assert_array_equal(mask[0], [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("one example", {}),
        ("packed", {"qkv_bias": True}),
        ("padded", {"num_kv_heads": 4}),
        ("padded", {"num_kv_heads": 1, "head_dim": 6, "rope_scaling": SCALING}),
    ],
)
def test_attention(x, name, changes):
    config = decoder_config(**changes)
    segments = MASKS[name]
    positions = np.stack([np.arange(7), np.arange(7)[::-1]])
    module = Attention(config, None, name="attention")
    mask = attention_mask(segments, segments, 0)
    rotary = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    inputs = (x, mask, rotary, AdapterContext())
    params = draw(shapes_of(module, *inputs))
    assert ("bias" in params["q"]) == config.qkv_bias
    assert "bias" not in params["o"]
    y = jax.jit(module.apply)({"params": params}, *inputs)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row in range(2):
        expected = reference.attention(
            x[row].astype(np.float64), exact, config, segments[row], positions[row]
        )
        real = segments[row] > 0
        np.testing.assert_allclose(y[row][real], expected[real], rtol=1e-4, atol=1e-5)


def test_mlp_is_swiglu(x):
    module = MLP(decoder_config(), None, name="mlp")
    params = draw(shapes_of(module, x, AdapterContext()))
    y = module.apply({"params": params}, x, AdapterContext())
    np.testing.assert_allclose(y, reference.mlp(x.astype(np.float64), params), rtol=1e-4, atol=1e-5)


def test_adapters_sit_where_their_targets_say():
    config = decoder_config()
    x = jnp.ones((1, 2, 8))
    adapter = LoRAConfig(targets=("mlp/up", "down"), overrides={"mlp/.*": {"rank": 3}})
    params = shapes_of(MLP(config, adapter, name="mlp"), x, AdapterContext())
    assert {name for name in params if "adapter" in params[name]} == {"up", "down"}
    assert params["down"]["adapter"]["lora_a"].shape == (12, 3)


SIZES = {
    "vocab_size": 8,
    "emb_dim": 8,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_dim": 8,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in SIZES for value in (0, -1, 2.0, True, "8", None)),
        ("num_kv_heads", 3),
        ("head_dim", 3),
        ("norm_eps", 0.0),
        ("norm_eps", "small"),
        ("norm_eps", float("nan")),
        ("rope_theta", -1.0),
        ("rope_theta", None),
        ("rope_scaling", 8.0),
        ("tie_embeddings", "no"),
        ("qkv_bias", 1),
        ("max_positions", 0),
        ("dtype", "float64"),
        ("param_dtype", "int8"),
        ("scan_layers", "yes"),
        ("remat_policy", "some"),
    ],
)
def test_wrong_sizes_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"\b{field}\b.* is not allowed: "):
        DecoderConfig(**SIZES | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", 0.5),
        ("factor", "8"),
        ("low_freq_factor", 0.0),
        ("high_freq_factor", 1.0),
        ("original_max_positions", 0),
    ],
)
def test_wrong_scaling_is_named(field, value):
    with pytest.raises(ConfigError, match=rf"rope_scaling\.{field}\b.* is not allowed: "):
        RopeScaling(**{field: value})
