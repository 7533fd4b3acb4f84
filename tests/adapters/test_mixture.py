"""What the soft mixtures share: the gate, its loss and statistics, wrong fields, padding, the router's precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdapterContext, MALoRAConfig, MoLoRAConfig, MoVConfig
from sira_jax.adapters.mixture import load_balance_loss, mixture_stats, soft_gate
from sira_jax.errors import ConfigError, MergeError
from tests.adapters.mixtures import (
    TRAINING,
    apply,
    balance,
    drawn,
    exact,
    initialised,
    layer,
    normal,
    token_gates,
)

B, T, D, F = 2, 5, 6, 4
CONFIGS = {
    "molora": MoLoRAConfig(num_experts=3, rank=2, load_balance_loss_weight=0.5),
    "malora": MALoRAConfig(num_experts=3, rank=2, shared_dim=4, load_balance_loss_weight=0.5),
    "mov": MoVConfig(num_experts=3, load_balance_loss_weight=0.5),
    "mov on the input": MoVConfig(num_experts=3, load_balance_loss_weight=0.5, position="input"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
VALID = np.array([[True, True, True, False, False], [False, True, True, True, True]])


@functools.partial(jax.jit, static_argnums=2)
def gate_loss_and_stats(logits, valid, config, tasks):
    gate = soft_gate(logits, valid, config)
    return gate, load_balance_loss(gate), mixture_stats(gate, tasks, 2)


@settings(max_examples=6, deadline=None)
@given(
    experts=st.integers(1, 5),
    k=st.one_of(st.none(), st.integers(1, 5)),
    rows=st.integers(1, 3),
    length=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_gate_loss_and_statistics_are_the_loops(experts, k, rows, length, seed):
    k = None if k is None else min(k, experts)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, length, 3))
    router = rng.normal(size=(3, experts))
    valid = rng.random((rows, length)) < 0.7
    valid[0, 0] = True
    tasks = rng.integers(0, 2, (rows, length))
    config = MoLoRAConfig(num_experts=experts, num_selected_experts=k)
    logits = (x @ router).astype(np.float32)
    gate, loss, stats = gate_loss_and_stats(logits, valid, config, tasks)

    pairs, entropy, confidence = np.zeros((2, experts)), np.zeros(2), 0.0
    for i, t in np.ndindex(valid.shape):
        if not valid[i, t]:
            assert not np.any(gate.probs_BTE[i, t])
            assert not np.any(gate.gates_BTE[i, t])
            continue
        probs, gates, selected = token_gates(x[i, t], router, k)
        np.testing.assert_allclose(gate.probs_BTE[i, t], probs, rtol=1e-5)
        np.testing.assert_allclose(gate.gates_BTE[i, t], gates, rtol=1e-5)
        pairs[tasks[i, t]] += np.asarray(gates) / sum(gates) * sum(selected)
        entropy[tasks[i, t]] -= sum(p * np.log(p) for p in probs)
        confidence += max(probs)
    # Without a selection and with all selected are the same: every expert is weighed.
    own_k = None if k == experts else k
    np.testing.assert_allclose(loss, balance(x, router, valid, own_k), rtol=1e-5)
    assert stats.tokens == valid.sum()
    assert stats.selected_pairs == valid.sum() * (k or experts)
    assert stats.dropped_pairs == 0
    np.testing.assert_allclose(stats.kept_pairs_E, pairs.sum(0), rtol=1e-5)
    np.testing.assert_allclose(stats.task_kept_pairs_ZE, pairs, rtol=1e-5)
    np.testing.assert_allclose(stats.entropy_sum, entropy.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.task_entropy_sum_Z, entropy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.confidence_sum, confidence, rtol=1e-5)
    np.testing.assert_array_equal(
        stats.task_tokens_Z, [np.sum(valid & (tasks == task)) for task in range(2)]
    )
    load = stats.summary()["expert_load"]
    np.testing.assert_allclose(load.sum(), 1.0, rtol=1e-5)


def test_balance_loss_is_1_for_even_use_and_e_for_one_expert():
    config = MoLoRAConfig(num_experts=4)
    valid = jnp.ones((2, 3), bool)
    even = soft_gate(jnp.zeros((2, 3, 4)), valid, config)
    one = soft_gate(jnp.full((2, 3, 4), -100.0).at[..., 2].set(0.0), valid, config)
    np.testing.assert_allclose(load_balance_loss(even), 1.0, rtol=1e-6)
    np.testing.assert_allclose(load_balance_loss(one), 4.0, rtol=1e-6)


@configs
def test_loss_is_weighted_and_statistics_are_sown_by_task(config):
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)
    tasks = np.arange(B * T).reshape(B, T) % 2
    context = TRAINING.replace(valid_BT=VALID, task_ids_BT=tasks, num_tasks=2)
    _, sown = apply(module, params, x, context)
    router = exact(params)["adapter"]["router"]
    expected = 0.5 * balance(exact(x), router, VALID)
    np.testing.assert_allclose(sown["losses"]["adapter"]["router"][0], expected, rtol=1e-5)
    stats = sown["metrics"]["adapter"]["router"][0]
    shares = np.zeros((2, 3))
    for i, t in zip(*np.nonzero(VALID), strict=True):
        shares[tasks[i, t]] += token_gates(exact(x)[i, t], router)[0]
    np.testing.assert_allclose(stats.task_kept_pairs_ZE, 3 * shares, rtol=1e-5)
    without = dataclasses.replace(config, load_balance_loss_weight=0.0)
    _, sown = apply(layer(without, F), params, x, context)
    assert sown["losses"]["adapter"]["router"][0] == 0


@configs
def test_content_of_padding_has_no_influence(config):
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)
    context = TRAINING.replace(valid_BT=VALID)

    @jax.jit
    def value(params, x):
        y, sown = apply(module, params, x, context)
        return jnp.sum(jnp.where(VALID[..., None], y, 0.0) ** 2) + sum(
            jax.tree.leaves(sown["losses"])
        )

    for content in (1e6, 3e38):
        other = np.where(VALID[..., None], x, content).astype(np.float32)
        first, first_sown = apply(module, params, x, context)
        second, second_sown = apply(module, params, other, context)
        np.testing.assert_array_equal(np.asarray(first)[VALID], np.asarray(second)[VALID])
        jax.tree.map(np.testing.assert_array_equal, first_sown, second_sown)
        grads = [jax.grad(value)(params, points)["adapter"] for points in (x, other)]
        jax.tree.map(np.testing.assert_array_equal, *grads)


@configs
def test_padding_keeps_the_frozen_output(config):
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)
    y, _ = apply(module, params, x, TRAINING.replace(valid_BT=VALID))
    plain, _ = apply(layer(None, F), {"kernel": params["kernel"]}, x, AdapterContext())
    np.testing.assert_array_equal(np.asarray(y)[~VALID], np.asarray(plain)[~VALID])
    assert np.abs(np.asarray(y - plain)[VALID]).min() > 0


@configs
def test_all_padding_gives_zeros_and_no_nan(config):
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)
    context = TRAINING.replace(valid_BT=np.zeros((B, T), bool))

    def loss(params):
        y, sown = apply(module, params, x, context)
        return jnp.sum(y) + sown["losses"]["adapter"]["router"][0]

    grads = jax.jit(jax.grad(loss))(params)["adapter"]
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@configs
@pytest.mark.parametrize(
    ("dtype", "k"),
    [
        ("float32", 2),
        pytest.param("float32", None, marks=pytest.mark.slow),
        pytest.param("bfloat16", None, marks=pytest.mark.slow),
    ],
)
def test_fresh_adapter_leaves_the_output_bitwise_unchanged(config, dtype, k):
    x = normal(B, T, D, seed=3)
    config = dataclasses.replace(config, num_selected_experts=k, router_init_std=1.0)
    module = layer(config, F, dtype=dtype, use_bias=True)
    params = initialised(module, x)
    params["bias"] = normal(F)
    plain = layer(None, F, dtype=dtype, use_bias=True)
    frozen = {name: params[name] for name in ("kernel", "bias")}
    expected, _ = apply(plain, frozen, x, AdapterContext())
    context = TRAINING.replace(valid_BT=VALID)
    np.testing.assert_array_equal(apply(module, params, x, context)[0], expected)


@configs
def test_router_stays_in_float32_under_bfloat16(config):
    """Its probabilities are those of the rounded input, but nothing after that is rounded."""
    x = normal(B, T, D)
    module = layer(config, F, dtype="bfloat16")
    params = drawn(module, x)
    _, sown = apply(module, params, x, TRAINING)
    loss = sown["losses"]["adapter"]["router"][0]
    rounded = exact(jnp.asarray(x, jnp.bfloat16))
    router = exact(params)["adapter"]["router"]
    assert loss.dtype == jnp.float32
    expected = 0.5 * balance(rounded, router, np.ones((B, T), bool))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(("method", "rank"), [("molora", 3), ("malora", 3), ("mov", 1)])
@pytest.mark.parametrize(("experts", "k"), [(4, None), (4, 2), (1, 1)])
def test_counts_are_those_of_the_real_tree_and_of_the_hand(method, rank, experts, k):
    d_in, d_out, shared = 5, 7, 2
    choices = {"num_experts": experts, "num_selected_experts": k, "rank": rank}
    used = k or experts
    if method == "malora":
        config = MALoRAConfig(**choices, shared_dim=shared)
        common, each = d_in * shared, shared * rank + rank * d_out
    elif method == "molora":
        config = MoLoRAConfig(**choices)
        common, each = 0, d_in * rank + rank * d_out
    else:
        config = MoVConfig(**choices)
        common, each = 0, d_out
    params = drawn(layer(config, d_out), np.ones((1, 1, d_in)))
    counted = sum(leaf.size for leaf in jax.tree.leaves(params["adapter"]))
    router = d_in * experts
    assert config.count_parameters(d_in, d_out) == counted == router + common + experts * each
    assert config.active_parameters(d_in, d_out) == router + common + used * each
    flops = config.flops_per_token(d_in, d_out)
    assert flops.router == 2 * router
    scaling = d_out if method == "mov" else 0
    assert flops.total == 2 * (router + common + used * each) + scaling


@configs
def test_merge_is_refused_with_a_reason(config):
    params = drawn(layer(config, F), np.ones((1, 1, D)))
    with pytest.raises(MergeError, match=f"'{config.method}' cannot be merged.*for each token"):
        config.merge(params["adapter"], params["kernel"])


BAD_SHARED = [
    ("num_experts", 0),
    ("num_experts", 4.0),
    ("num_experts", True),
    ("num_experts", None),
    ("num_selected_experts", 0),
    ("num_selected_experts", 9),
    ("num_selected_experts", 2.0),
    ("num_selected_experts", True),
    ("router_init_std", -0.1),
    ("router_init_std", None),
    ("router_init_std", float("nan")),
    ("load_balance_loss_weight", -1.0),
    ("load_balance_loss_weight", True),
    ("load_balance_loss_weight", float("inf")),
]
BAD_OWN = [
    (MoLoRAConfig, "a_init_std", -1.0),
    (MoLoRAConfig, "a_init_std", "0.02"),
    (MALoRAConfig, "shared_dim", 0),
    (MALoRAConfig, "shared_dim", None),
    (MALoRAConfig, "shared_dim", 2.5),
    (MALoRAConfig, "p_init_std", -1.0),
    (MALoRAConfig, "p_init_std", float("nan")),
    (MoVConfig, "position", "middle"),
    (MoVConfig, "position", None),
    (MoVConfig, "rank", 4),
    (MoVConfig, "alpha", 8.0),
    (MoVConfig, "dropout_rate", 0.1),
]


@pytest.mark.parametrize(
    ("config_class", "field", "value"),
    [
        (config_class, field, value)
        for config_class in (MoLoRAConfig, MALoRAConfig, MoVConfig)
        for field, value in BAD_SHARED
    ]
    + BAD_OWN,
)
def test_wrong_fields_are_named(config_class, field, value):
    with pytest.raises(ConfigError, match=rf"^adapter\.{field}=.* is not allowed: "):
        config_class(**{field: value})


@pytest.mark.parametrize("config_class", [MoLoRAConfig, MALoRAConfig, MoVConfig])
def test_every_field_has_a_wrong_value_here(config_class):
    tried = {field for field, _ in BAD_SHARED}
    tried |= {field for owner, field, _ in BAD_OWN if owner is config_class}
    # tests/adapters/test_base.py tries those of all methods.
    tried |= {"rank", "alpha", "dropout_rate", "targets", "overrides"}
    assert tried == {field.name for field in dataclasses.fields(config_class)}
