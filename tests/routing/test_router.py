import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.errors import ConfigError
from sira_jax.routing import RoutingConfig, route, router_logits
from tests.routing.helpers import quick_jit, quick_route

UNLIMITED = {"capacity_factor": None}


def everyone(logits):
    return np.ones(logits.shape[:2], bool)


@pytest.mark.parametrize("experts", [6, 70])
def test_ties_go_to_the_lower_index(experts):
    config = RoutingConfig(num_experts=experts, num_selected_experts=3, **UNLIMITED)
    logits = np.zeros((1, 4, experts), np.float32)
    logits[0, 1, [2, 4]] = 1.0
    logits[0, 2, experts - 1] = 1.0
    logits[0, 3] = np.arange(experts) // 2  # pairs of equals
    routing = quick_route(logits, everyone(logits), config, deterministic=True)
    last = experts - 1
    assert routing.indices_GSK[0].tolist() == [
        [0, 1, 2], [2, 4, 0], [last, 0, 1], [last - 1, last, last - 3],
    ]  # fmt: skip
    assert np.sum(routing.selected_GSE, axis=-1).tolist() == [[3] * 4]


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 5), (16, 4), (70, 3)])
def test_selects_the_largest_and_leaves_gates_as_they_are(experts, k):
    config = RoutingConfig(num_experts=experts, num_selected_experts=k, **UNLIMITED)
    logits = np.random.default_rng(0).normal(size=(2, 9, experts)).astype(np.float32)
    routing = quick_route(logits, everyone(logits), config, deterministic=True)
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(routing.indices_GSK, expected)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.probs_GSE, probs, rtol=1e-5)
    selected = np.asarray(routing.selected_GSE)
    assert (selected.sum(-1) == k).all()
    np.testing.assert_allclose(routing.gates_GSE, np.where(selected, probs, 0), rtol=1e-5)


def test_renormalized_gates_sum_to_one():
    config = RoutingConfig(num_experts=6, num_selected_experts=2, renormalize=True, **UNLIMITED)
    logits = np.random.default_rng(0).normal(size=(1, 7, 6)).astype(np.float32)
    routing = quick_route(logits, everyone(logits), config, deterministic=True)
    np.testing.assert_allclose(np.sum(routing.gates_GSE, axis=-1), 1.0, rtol=1e-6)


def test_renormalizing_nothing_is_safe():
    config = RoutingConfig(
        num_experts=2, num_selected_experts=1, renormalize=True, expert_dropout_rate=0.9
    )
    logits = jnp.zeros((1, 60, 2))

    def total(logits):
        routing = route(
            logits, everyone(logits), config, deterministic=False, rng=jax.random.key(0)
        )
        return jnp.sum(routing.gates_GSE), routing

    gradient, routing = quick_jit(jax.grad(total, has_aux=True))(logits)
    assert (np.sum(routing.gates_GSE, axis=-1) == 0).any()
    assert np.isfinite(gradient).all()
    assert np.isfinite(routing.gates_GSE).all()


@pytest.mark.parametrize("position", ["before_topk", "after_topk"])
def test_dropout_drops_each_gate_at_the_rate_and_scales_the_rest(position):
    config = RoutingConfig(
        num_experts=8, num_selected_experts=8, expert_dropout_rate=0.25,
        expert_dropout_position=position, **UNLIMITED,
    )  # fmt: skip
    logits = np.random.default_rng(0).normal(size=(4, 500, 8)).astype(np.float32)
    options = {"deterministic": False, "rng": jax.random.key(1)}
    routing = quick_route(logits, everyone(logits), config, **options)
    gates = np.asarray(routing.gates_GSE)
    dropped = gates == 0
    np.testing.assert_allclose(
        gates[~dropped], np.asarray(routing.probs_GSE)[~dropped] / 0.75, rtol=1e-6
    )
    # 16000 gates: a standard deviation is 0.0034 of all and 0.0097 of one expert's.
    assert abs(dropped.mean() - 0.25) < 0.015
    assert np.abs(dropped.mean(axis=(0, 1)) - 0.25).max() < 0.045
    correlation = np.corrcoef(dropped.reshape(-1, 8).T) - np.eye(8)
    assert np.abs(correlation).max() < 0.1
    again = quick_route(logits, everyone(logits), config, **options)
    np.testing.assert_array_equal(again.gates_GSE, gates)
    other = quick_route(
        logits, everyone(logits), config, deterministic=False, rng=jax.random.key(2)
    )
    assert (np.asarray(other.gates_GSE) != gates).any()
    # Probabilities, which losses and metrics read, are those before dropout.
    plain = quick_route(logits, everyone(logits), config, deterministic=True)
    np.testing.assert_array_equal(routing.probs_GSE, plain.probs_GSE)
    np.testing.assert_allclose(plain.gates_GSE, plain.probs_GSE)


def test_dropout_before_the_selection_lets_others_in():
    fields = {"num_experts": 8, "num_selected_experts": 2, "expert_dropout_rate": 0.5, **UNLIMITED}
    logits = np.tile(np.arange(8.0, dtype=np.float32), (1, 200, 1))
    selected = {}
    for position in ("before_topk", "after_topk"):
        config = RoutingConfig(expert_dropout_position=position, **fields)
        routing = quick_route(
            logits, everyone(logits), config, deterministic=False, rng=jax.random.key(0)
        )
        selected[position] = np.asarray(routing.selected_GSE)
        assert (selected[position].sum(-1) == 2).all()
    assert selected["after_topk"][..., 6:].all()
    assert selected["before_topk"].sum(axis=1)[0, 5] > 20


def test_a_dropped_expert_that_is_selected_takes_no_place():
    config = RoutingConfig(
        num_experts=3, num_selected_experts=3, capacity_factor=0.2, min_capacity=1,
        expert_dropout_rate=0.5,
    )  # fmt: skip
    logits = jnp.zeros((1, 40, 3))
    routing = quick_route(
        logits, everyone(logits), config, deterministic=False, rng=jax.random.key(3)
    )
    queued = np.asarray(routing.queued_GSE)
    assert np.asarray(routing.selected_GSE).all()
    assert not queued.all()
    assert routing.capacity == 8
    assert np.sum(routing.kept_GSE, axis=1).tolist() == [[8, 8, 8]]
    assert not np.asarray(routing.kept_GSE)[~queued].any()


def test_padding_is_empty():
    config = RoutingConfig(num_experts=4, num_selected_experts=2)
    logits = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    logits[0, 3] = np.inf
    valid = np.ones((2, 6), bool)
    valid[0, 3] = valid[1] = False
    routing = quick_route(logits, valid, config, deterministic=False)
    for name in ("probs_GSE", "gates_GSE", "selected_GSE", "queued_GSE", "kept_GSE"):
        assert not np.asarray(getattr(routing, name))[~valid].any(), name
    np.testing.assert_array_equal(routing.valid_GS, valid)


def test_a_router_that_is_not_a_number_is_not_hidden():
    config = RoutingConfig(num_experts=4, num_selected_experts=2)
    logits = np.full((1, 3, 4), np.nan, np.float32)
    routing = quick_route(logits, everyone(logits), config, deterministic=False)
    assert np.isnan(routing.gates_GSE).any(axis=-1).all()


def test_logits_are_float32_products():
    rng = np.random.default_rng(0)
    x_bf16 = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.bfloat16)
    router = rng.normal(size=(64, 4)).astype(np.float32)
    logits = router_logits(x_bf16, router)
    assert logits.dtype == jnp.float32
    exact = np.asarray(x_bf16, np.float64) @ router
    np.testing.assert_allclose(logits, exact, atol=1e-5)


def test_the_missing_key_is_named():
    logits = jnp.zeros((1, 2, 16))
    with pytest.raises(ConfigError, match=r"rng=None.*expert_dropout_rate=0\.1"):
        route(logits, everyone(logits), RoutingConfig(expert_dropout_rate=0.1), deterministic=False)


@pytest.mark.parametrize(("shape", "valid"), [((1, 2, 15), (1, 2)), ((1, 2, 16), (2, 1))])
def test_shapes_that_disagree_are_refused(shape, valid):
    with pytest.raises(ConfigError, match="shape"):
        route(jnp.zeros(shape), np.ones(valid, bool), RoutingConfig(), deterministic=True)
