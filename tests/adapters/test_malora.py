"""MALoRA against plain loops: y = x W0 + s sum_e p_e ((x S) P_e) B_e; its start, and its cost beside MoLoRA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdapterContext, MALoRAConfig, MoLoRAConfig
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
                a = adapter["shared_a"] @ adapter["expert_p"][e]
                scale = config.alpha / config.rank
                y[i, t] += scale * gate * ((x[i, t] @ a) @ adapter["lora_b"][e])
    return y


@settings(max_examples=6, deadline=None)
@given(
    experts=st.integers(1, 5),
    k=st.one_of(st.none(), st.integers(1, 5)),
    rank=st.integers(1, 4),
    shared=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(experts, k, rank, shared, shape, seed):
    rows, length, d_in, d_out = shape
    k = None if k is None else min(k, experts)
    config = MALoRAConfig(
        num_experts=experts, num_selected_experts=k, rank=rank, shared_dim=shared, alpha=3.0
    )
    x = normal(rows, length, d_in, seed=seed)
    valid = np.random.default_rng(seed).random((rows, length)) < 0.8
    module = layer(config, d_out)
    params = drawn(module, x, seed)
    y, _ = apply(module, params, x, TRAINING.replace(valid_BT=valid))
    expected = reference(params, x, valid, config)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("k", [None, 2])
def test_gradients_are_the_loops_differences(k):
    config = MALoRAConfig(
        num_experts=3,
        num_selected_experts=k,
        rank=2,
        shared_dim=3,
        alpha=3.0,
        load_balance_loss_weight=0.5,
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


def test_it_is_molora_with_the_products_as_a():
    x = normal(B, T, D)
    module = layer(MALoRAConfig(num_experts=3, rank=2, shared_dim=4, alpha=3.0), F)
    params = drawn(module, x)
    adapter = params["adapter"]
    factored = {
        "router": adapter["router"],
        "lora_a": np.einsum("dj,ejr->edr", adapter["shared_a"], adapter["expert_p"]),
        "lora_b": adapter["lora_b"],
    }
    molora = layer(MoLoRAConfig(num_experts=3, rank=2, alpha=3.0), F)
    kernel = {"kernel": params["kernel"]}
    expected, _ = apply(molora, kernel | {"adapter": factored}, x, AdapterContext())
    y, _ = apply(module, params, x, AdapterContext())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_the_equation_of_the_rounded_input():
    config = MALoRAConfig(num_experts=3, rank=2, shared_dim=3)
    x = normal(B, T, D)
    module = layer(config, F, dtype="bfloat16")
    params = drawn(module, x)
    rounded = exact(jax.tree.map(lambda leaf: jnp.asarray(leaf, "bfloat16"), (params, x)))
    rounded[0]["adapter"]["router"] = exact(params["adapter"]["router"])
    y = exact(apply(module, params, x, AdapterContext())[0])
    expected = reference(*rounded, np.ones((B, T), bool), config)
    np.testing.assert_allclose(y, expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("shared", [4, 24])
def test_products_start_with_the_variance_of_a_loras_a(shared):
    d_in = 300
    config = MALoRAConfig(num_experts=64, rank=20, shared_dim=shared)
    adapter = initialised(layer(config, 2), np.ones((1, 1, d_in), np.float32))["adapter"]
    assert {name: leaf.shape for name, leaf in adapter.items()} == {
        "router": (d_in, 64),
        "shared_a": (d_in, shared),
        "expert_p": (64, shared, 20),
        "lora_b": (64, 20, 2),
    }
    bound = d_in**-0.5
    assert np.abs(adapter["shared_a"]).max() <= bound
    np.testing.assert_allclose(adapter["shared_a"].std(), bound / 3**0.5, rtol=0.06)
    np.testing.assert_allclose(adapter["expert_p"].std(), shared**-0.5, rtol=0.05)
    products = np.einsum("dj,ejr->edr", *(adapter[name] for name in ("shared_a", "expert_p")))
    # The variance of U(-b, b), b = 1 / sqrt(D). S is one draw for all experts: its own spread stays.
    np.testing.assert_allclose(products.var(), 1 / (3 * d_in), rtol=0.08)
    assert abs(products.mean()) < 0.05 * products.std()
    assert len({float(v) for v in adapter["expert_p"][:, 0, 0]}) == 64
    assert not adapter["lora_b"].any()


def test_start_of_p_is_a_field():
    config = MALoRAConfig(num_experts=64, rank=20, shared_dim=8, p_init_std=0.1)
    adapter = initialised(layer(config, 2), np.ones((1, 1, 5), np.float32))["adapter"]
    np.testing.assert_allclose(adapter["expert_p"].std(), 0.1, rtol=0.03)


# The settings of docs/malora.md: MoLoRA's (experts, rank) and MALoRA's (r_hi, shared_dim) in their place.
SETTINGS = [
    ((8, 4), (4, 8), 0.301, 1.039),
    ((16, 16), (18, 24), 0.316, 1.194),
    ((16, 32), (34, 36), 0.356, 1.318),
    ((16, 32), (36, 36), 0.321, 1.278),
    ((16, 64), (68, 68), 0.337, 1.372),
]
EMB, MLP, LAYERS, VOCAB, LENGTH = 512, 1408, 8, 4096, 128
# (D, F) of q, k, v, o, gate, up, down.
SHAPES = [(EMB, EMB)] * 4 + [(EMB, MLP)] * 2 + [(MLP, EMB)]


def step_flops(config):
    """FLOPs of a training step for each token of a row: what is frozen needs no gradient of its weights."""
    flops = 0
    for d_in, d_out in SHAPES:
        frozen_forward, frozen_backward = 2 * d_in * d_out, 2 * d_in * d_out
        adapter = 3 * config.flops_per_token(d_in, d_out).total
        flops += frozen_forward + frozen_backward + adapter
    # Scores and weighted values, both operands with gradients; then the logits.
    flops += 3 * 2 * 2 * LENGTH * EMB
    return LAYERS * flops + 2 * 2 * EMB * VOCAB


@pytest.mark.parametrize(("molora", "malora", "saved", "speedup"), SETTINGS)
def test_parameters_and_flops_beside_molora_are_those_of_the_docs(molora, malora, saved, speedup):
    full = MoLoRAConfig(num_experts=molora[0], rank=molora[1])
    shared = MALoRAConfig(num_experts=molora[0], rank=malora[0], shared_dim=malora[1])
    counts = [sum(config.count_parameters(*shape) for shape in SHAPES) for config in (full, shared)]
    assert 0.30 <= 1 - counts[1] / counts[0] <= 0.48
    np.testing.assert_allclose(1 - counts[1] / counts[0], saved, atol=6e-4)
    np.testing.assert_allclose(step_flops(full) / step_flops(shared), speedup, atol=6e-4)
    assert malora[0] >= molora[1]
