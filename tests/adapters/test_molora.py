"""MoLoRA against plain loops over tokens and experts: y = x W0 + s sum_e p_e (x A_e) B_e."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdapterContext, LoRAConfig, MoLoRAConfig
from tests.adapters.mixtures import (
    TRAINING,
    apply,
    check_gradients,
    drawn,
    exact,
    initialised,
    layer,
    normal,
    token_gates,
)

B, T, D, F = 2, 5, 5, 4


def reference(params, x, valid, config):
    """Output in float64, one token and one expert at a time."""
    params, x = exact(params), exact(x)
    adapter = params["adapter"]
    y = np.zeros((*valid.shape, params["kernel"].shape[1]))
    for i, t in np.ndindex(valid.shape):
        y[i, t] = x[i, t] @ params["kernel"]
        if valid[i, t]:
            gates = token_gates(x[i, t], adapter["router"], config.num_selected_experts)[1]
            for e, gate in enumerate(gates):
                hidden = x[i, t] @ adapter["lora_a"][e]
                y[i, t] += config.alpha / config.rank * gate * (hidden @ adapter["lora_b"][e])
    return y


@settings(max_examples=6, deadline=None)
@given(
    experts=st.integers(1, 5),
    k=st.one_of(st.none(), st.integers(1, 5)),
    rank=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(experts, k, rank, shape, seed):
    rows, length, d_in, d_out = shape
    k = None if k is None else min(k, experts)
    config = MoLoRAConfig(num_experts=experts, num_selected_experts=k, rank=rank, alpha=3.0)
    x = normal(rows, length, d_in, seed=seed)
    valid = np.random.default_rng(seed).random((rows, length)) < 0.8
    module = layer(config, d_out)
    params = drawn(module, x, seed)
    y, _ = apply(module, params, x, TRAINING.replace(valid_BT=valid))
    expected = reference(params, x, valid, config)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("k", [None, 2])
def test_gradients_are_the_loops_differences(k):
    config = MoLoRAConfig(
        num_experts=3, num_selected_experts=k, rank=2, alpha=3.0, load_balance_loss_weight=0.5
    )
    x = normal(B, T, D)
    valid = np.ones((B, T), bool)
    valid[0, 3:] = False
    module = layer(config, F)
    check_gradients(
        module,
        lambda params, x, valid: reference(params, x, valid, config),
        drawn(module, x, scale=0.7),
        x,
        valid,
        weight=0.5,
        k=k,
    )


def test_every_expert_takes_part_and_the_selection_is_not_renormalised():
    """Experts that multiply by one show the sum of the gates: 1 for all, less for a selection."""
    x = normal(B, T, D)
    soft = MoLoRAConfig(num_experts=4, rank=1, alpha=1.0)
    adapter = {
        "router": normal(D, 4, seed=1),
        "lora_a": np.eye(D, dtype=np.float32)[None, :, :1].repeat(4, axis=0),
        "lora_b": np.eye(4, dtype=np.float32)[:, None],
    }
    params = {"kernel": np.zeros((D, 4), np.float32), "adapter": adapter}
    probs = np.asarray([[token_gates(token, adapter["router"])[0] for token in row] for row in x])
    y, _ = apply(layer(soft, 4), params, x, AdapterContext())
    np.testing.assert_allclose(y, x[..., :1] * probs, rtol=1e-4, atol=1e-6)
    top = dataclasses.replace(soft, num_selected_experts=1)
    y, _ = apply(layer(top, 4), params, x, AdapterContext())
    best = np.where(probs == probs.max(-1, keepdims=True), probs, 0.0)
    np.testing.assert_allclose(y, x[..., :1] * best, rtol=1e-4, atol=1e-6)


def test_one_expert_is_lora():
    x = normal(B, T, D)
    module = layer(MoLoRAConfig(num_experts=1, rank=2, alpha=3.0), F)
    params = drawn(module, x)
    pair = {name: params["adapter"][name][0] for name in ("lora_a", "lora_b")}
    lora = layer(LoRAConfig(rank=2, alpha=3.0), F)
    expected, _ = apply(lora, {"kernel": params["kernel"], "adapter": pair}, x, AdapterContext())
    y, _ = apply(module, params, x, AdapterContext())
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_near_the_equation_of_the_rounded_input():
    config = MoLoRAConfig(num_experts=3, rank=2)
    x = normal(B, T, D)
    module = layer(config, F, dtype="bfloat16")
    params = drawn(module, x)
    rounded = exact(jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "bfloat16"), (params, x)))
    rounded[0]["adapter"]["router"] = exact(params["adapter"]["router"])
    y = exact(apply(module, params, x, AdapterContext())[0])
    expected = reference(*rounded, np.ones((B, T), bool), config)
    np.testing.assert_allclose(y, expected, atol=0.03 * np.abs(expected).max())


def test_dropout_is_in_training_alone_and_not_seen_by_the_router():
    x = normal(B, T, D)
    config = MoLoRAConfig(num_experts=3, rank=2, dropout_rate=0.5, load_balance_loss_weight=1.0)
    module, plain = layer(config, F), layer(dataclasses.replace(config, dropout_rate=0.0), F)
    params = drawn(module, x)
    rngs = {"dropout": jax.random.key(4)}
    expected, expected_sown = apply(plain, params, x, TRAINING)
    evaluated, _ = apply(module, params, x, AdapterContext(), rngs)
    np.testing.assert_array_equal(evaluated, expected)
    y, sown = apply(module, params, x, TRAINING, rngs)
    assert np.abs(np.asarray(y - expected)).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sown, expected_sown)
    # The experts are linear in their input, so the mean over masks is the output without.
    draws = jax.vmap(lambda key: apply(module, params, x, TRAINING, {"dropout": key})[0])(
        jax.random.split(jax.random.key(5), 4000)
    )
    standard_error = np.std(draws, axis=0) / 4000**0.5
    assert np.all(np.abs(np.mean(draws, axis=0) - expected) < 5 * standard_error)


def test_initialisation():
    config = MoLoRAConfig(num_experts=8, rank=16, router_init_std=0.03, a_init_std=0.05)
    adapter = initialised(layer(config, 3), np.ones((1, 1, 400), np.float32))["adapter"]
    assert {name: leaf.shape for name, leaf in adapter.items()} == {
        "router": (400, 8),
        "lora_a": (8, 400, 16),
        "lora_b": (8, 16, 3),
    }
    np.testing.assert_allclose(adapter["router"].std(), 0.03, rtol=0.06)
    np.testing.assert_allclose(adapter["lora_a"].std(axis=(1, 2)), 0.05, rtol=0.05)
    # Not uniform, and no two experts are equal.
    assert np.abs(adapter["lora_a"]).max() > 3 * 0.05
    assert len({float(v) for v in adapter["lora_a"][:, 0, 0]}) == 8
    assert not adapter["lora_b"].any()
    defaults = MoLoRAConfig()
    assert (defaults.a_init_std, defaults.router_init_std) == (0.02, 0.02)
