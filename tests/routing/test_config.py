import dataclasses
import pickle

import pytest

from sira_jax.errors import ConfigError
from sira_jax.routing import RoutingConfig


def test_is_hashable_and_compares_by_value():
    assert {RoutingConfig(num_experts=8): 1}[RoutingConfig(num_experts=8)] == 1
    assert RoutingConfig() != RoutingConfig(renormalize=True)
    assert pickle.loads(pickle.dumps(RoutingConfig())) == RoutingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        RoutingConfig().num_experts = 3


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_experts", 0, "a whole number over 0"),
        ("num_experts", 4.0, "a whole number over 0"),
        ("num_experts", True, "a whole number over 0"),
        ("num_selected_experts", 0, "from 1 to num_experts=16"),
        ("num_selected_experts", 17, "from 1 to num_experts=16"),
        ("capacity_factor", 0, "over 0, or None"),
        ("capacity_factor", float("inf"), "over 0, or None"),
        ("eval_capacity_factor", -1.0, "over 0, or None"),
        ("eval_capacity_factor", "2", "over 0, or None"),
        ("min_capacity", -1, "0 or more"),
        ("group_size", 0, "over 0, or None"),
        ("capacity_counts_k", 1, "true or false"),
        ("renormalize", "yes", "true or false"),
        ("expert_dropout_rate", 1.0, r"in \[0, 1\)"),
        ("expert_dropout_rate", float("nan"), r"in \[0, 1\)"),
        ("expert_dropout_position", "after", "before_topk, after_topk"),
        ("dispatch", "sorted", "auto, einsum, masked, ragged"),
        ("load_balance_loss_weight", -0.1, "0 or more"),
        ("router_z_loss_weight", None, "0 or more"),
        ("router_init_std", float("nan"), "0 or more"),
    ],
)
def test_a_field_out_of_range_is_named(field, value, allowed):
    with pytest.raises(ConfigError, match=rf"routing\.{field}=.*{allowed}"):
        RoutingConfig(**{field: value})
