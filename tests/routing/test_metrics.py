import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.errors import ConfigError
from sira_jax.routing import RouterStats, RoutingConfig, router_metrics, router_stats
from tests.routing.helpers import assert_close, quick_jit, quick_route

CONFIG = RoutingConfig(num_experts=4, num_selected_experts=2, capacity_factor=0.6, min_capacity=1)


def random_routing(seed=0, groups=2, tokens=13, share=0.7):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(groups, tokens, 4)).astype(np.float32)
    valid = rng.random((groups, tokens)) < share
    tasks = rng.integers(0, 3, size=(groups, tokens))
    return quick_route(logits, valid, CONFIG, deterministic=False), valid, tasks


def by_loops(routing, valid, tasks, num_tasks):
    probs, kept = np.asarray(routing.probs_GSE, np.float64), np.asarray(routing.kept_GSE)
    load, task_load = np.zeros(4), np.zeros((num_tasks, 4))
    entropies, confidences = [], []
    task_entropies = [[] for _ in range(num_tasks)]
    for index in zip(*np.nonzero(valid), strict=True):
        entropy = -sum(p * np.log(p) for p in probs[index])
        entropies.append(entropy)
        confidences.append(max(probs[index]))
        task_entropies[tasks[index]].append(entropy)
        load += kept[index]
        task_load[tasks[index]] += kept[index]
    pairs = 2 * valid.sum()
    return {
        "expert_load": load / load.sum(),
        "dropped_share": (pairs - load.sum()) / pairs,
        "gate_entropy": np.mean(entropies),
        "router_confidence": np.mean(confidences),
        "task_expert_load": task_load / task_load.sum(axis=1, keepdims=True),
        "task_gate_entropy": [np.mean(values) for values in task_entropies],
        "task_tokens": [len(values) for values in task_entropies],
    }


def test_matches_loops():
    routing, valid, tasks = random_routing()
    metrics = quick_jit(router_metrics, static_argnums=2)(routing, tasks, 3)
    expected = by_loops(routing, valid, tasks, 3)
    assert 0 < expected["dropped_share"] < 1
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(metrics[name], value, 1e-6, name)
    assert_close(np.sum(metrics["expert_load"]), 1.0, 1e-6)


def test_without_tasks():
    routing, *_ = random_routing()
    assert router_metrics(routing).keys() == {
        "expert_load", "dropped_share", "gate_entropy", "router_confidence",
    }  # fmt: skip


def test_sums_make_means_over_uneven_batches_exact():
    logits = np.random.default_rng(0).normal(size=(3, 10, 4)).astype(np.float32)
    valid = np.arange(10) < np.array([[10], [4], [1]])
    tasks = np.tile([0, 1], (3, 5))
    whole = router_stats(quick_route(logits, valid, CONFIG, deterministic=False), tasks, 2)
    parts = [
        router_stats(
            quick_route(logits[g : g + 1], valid[g : g + 1], CONFIG, deterministic=False),
            tasks[g : g + 1],
            2,
        )
        for g in range(3)
    ]
    joined = parts[0] + parts[1] + parts[2]
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    assert isinstance(stacked, RouterStats)
    for other in (joined, stacked.reduce()):
        for name, value in whole.summary().items():
            assert_close(other.summary()[name], value, 1e-6, name)


def test_a_task_without_tokens_and_ids_of_no_task():
    routing, valid, tasks = random_routing()
    ids = np.where(tasks == 0, -1, np.where(tasks == 1, 7, 2))
    metrics = router_metrics(routing, ids, 4)
    here = valid & (tasks == 2)
    np.testing.assert_array_equal(metrics["task_tokens"], [0, 0, here.sum(), 0])
    np.testing.assert_array_equal(np.asarray(metrics["task_expert_load"])[[0, 1, 3]], 0.0)
    np.testing.assert_array_equal(np.asarray(metrics["task_gate_entropy"])[[0, 1, 3]], 0.0)


def test_tasks_need_their_ids():
    routing, *_ = random_routing()
    with pytest.raises(ConfigError, match=r"task_ids_GS=None.*num_tasks=2"):
        router_stats(routing, None, 2)


def test_all_padding_is_zero_and_finite():
    routing, _, tasks = random_routing(share=0.0)
    for name, value in router_metrics(routing, tasks, 3).items():
        np.testing.assert_array_equal(value, 0.0, err_msg=name)


def test_dropped_gates_are_not_counted_as_turned_away():
    config = RoutingConfig(
        num_experts=4, num_selected_experts=2, capacity_factor=None, expert_dropout_rate=0.5,
        expert_dropout_position="after_topk",
    )  # fmt: skip
    routing = quick_route(
        jnp.zeros((1, 50, 4)), np.ones((1, 50), bool), config, deterministic=False,
        rng=jax.random.key(0),
    )  # fmt: skip
    stats = router_stats(routing)
    assert stats.selected_pairs == 100
    assert np.sum(stats.kept_pairs_E) < 80
    assert stats.dropped_pairs == 0


def test_no_gradient_flows():
    def entropy(logits):
        routing = quick_route.__wrapped__(
            logits, np.ones((1, 3), bool), CONFIG, deterministic=False
        )
        return router_metrics(routing)["gate_entropy"]

    gradient = jax.grad(entropy)(np.random.default_rng(0).normal(size=(1, 3, 4)))
    np.testing.assert_array_equal(gradient, 0.0)
