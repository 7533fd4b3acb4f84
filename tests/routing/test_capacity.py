import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.routing import RoutingConfig, expert_capacity
from sira_jax.routing.capacity import queue_positions, within_capacity
from tests.routing.helpers import quick_jit, quick_route


@pytest.mark.parametrize(
    ("fields", "tokens", "expected"),
    [
        ({}, 512, 160),  # ceil(1.25 * 4 * 512 / 16)
        ({}, 13, 5),  # ceil(4.0625)
        ({}, 8, 4),  # min_capacity over ceil(2.5)
        ({"min_capacity": 0}, 8, 3),
        ({"capacity_counts_k": False}, 512, 40),
        ({"capacity_factor": None}, 37, 37),
        ({"capacity_factor": 100.0}, 10, 250),  # binds nothing
    ],
)
def test_formula(fields, tokens, expected):
    assert expert_capacity(tokens, RoutingConfig(**fields), deterministic=False) == expected


def test_evaluation_has_its_own_factor():
    config = RoutingConfig(capacity_factor=1.0, eval_capacity_factor=2.0)
    assert expert_capacity(64, config, deterministic=False) == 16
    assert expert_capacity(64, config, deterministic=True) == 32
    assert expert_capacity(64, RoutingConfig(), deterministic=True) == 64


def test_first_choices_come_before_all_second_choices():
    # Token 0 has experts (0, 1) as first and second choice, token 1 (1, 0), token 2 (0, 1).
    rank_GSE = jnp.array([[[0, 1], [1, 0], [0, 1]]])
    everyone = jnp.ones((1, 3, 2), bool)
    position_GSE = queue_positions(rank_GSE, everyone, 2)
    np.testing.assert_array_equal(position_GSE, [[[0, 1], [2, 0], [1, 2]]])
    np.testing.assert_array_equal(
        within_capacity(rank_GSE, everyone, 2, 1), [[[1, 0], [0, 1], [0, 0]]]
    )
    np.testing.assert_array_equal(
        within_capacity(rank_GSE, everyone, 2, 2), [[[1, 1], [0, 1], [1, 0]]]
    )


def test_those_who_do_not_queue_take_no_place():
    rank_GSE = jnp.array([[[0], [0], [0], [0]]])
    queued_GSE = jnp.array([[[False], [True], [False], [True]]])
    kept_GSE = within_capacity(rank_GSE, queued_GSE, 1, 2)
    np.testing.assert_array_equal(kept_GSE, queued_GSE)
    assert queue_positions(rank_GSE, queued_GSE, 1)[0, [1, 3], 0].tolist() == [0, 1]


_positions = quick_jit(queue_positions, static_argnums=2)
_kept = quick_jit(within_capacity, static_argnums=(2, 3))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    choices=st.sampled_from([1, 2, 5]),
    capacity=st.sampled_from([1, 3, 12, 19]),
    queued_share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_short_way_to_the_kept_pairs(seed, choices, capacity, queued_share):
    rng = np.random.default_rng(seed)
    rank_GSE = rng.permuted(np.tile(np.arange(5), (2, 19, 1)), axis=-1).astype(np.int32)
    queued_GSE = (rank_GSE < choices) & (rng.random((2, 19, 5)) < queued_share)
    position_GSE = _positions(rank_GSE, queued_GSE, choices)
    kept_GSE = _kept(rank_GSE, queued_GSE, choices, capacity)
    np.testing.assert_array_equal(kept_GSE, queued_GSE & (position_GSE < capacity))
    assert np.sum(kept_GSE, axis=1).max() <= capacity


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25]),
    skew=st.sampled_from([0.0, 2.0, 50.0]),
)
def test_no_expert_keeps_more_than_capacity(seed, factor, skew):
    config = RoutingConfig(
        num_experts=6, num_selected_experts=3, capacity_factor=factor, min_capacity=1
    )
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 23, 6)) + skew * (np.arange(6) == 2)
    valid = rng.random((3, 23)) < 0.8
    routing = quick_route(logits, valid, config, deterministic=False)
    capacity = expert_capacity(23, config, deterministic=False)
    kept_GE = np.sum(routing.kept_GSE, axis=1)
    assert kept_GE.max() <= capacity
    # And no place stays free while a pair is turned away.
    queued_GE = np.sum(routing.queued_GSE, axis=1)
    np.testing.assert_array_equal(kept_GE, np.minimum(queued_GE, capacity))


def test_priority_follows_the_order_of_tokens():
    """Reversing the tokens keeps each expert's count and gives its places to others."""
    config = RoutingConfig(
        num_experts=4, num_selected_experts=2, capacity_factor=0.5, min_capacity=1
    )
    logits = np.random.default_rng(1).normal(size=(2, 32, 4)).astype(np.float32)
    valid = np.ones((2, 32), bool)
    forward = quick_route(logits, valid, config, deterministic=False)
    backward = quick_route(logits[:, ::-1], valid, config, deterministic=False)
    selected = np.asarray(forward.selected_GSE)
    np.testing.assert_array_equal(np.asarray(backward.selected_GSE)[:, ::-1], selected)
    kept, kept_of_reversed = (
        np.asarray(forward.kept_GSE), np.asarray(backward.kept_GSE)[:, ::-1]
    )  # fmt: skip
    np.testing.assert_array_equal(kept.sum(axis=1), kept_of_reversed.sum(axis=1))
    assert (kept != kept_of_reversed).any()
    first_choice = np.asarray(forward.indices_GSK)[..., 0]
    for group in range(2):
        for expert in range(4):
            wanting = np.flatnonzero(first_choice[group] == expert)
            capacity = forward.capacity
            assert kept[group, wanting[:capacity], expert].all()
            assert kept_of_reversed[group, wanting[::-1][:capacity], expert].all()
