"""Sparse routing of tokens to low-rank experts."""

from sira_jax.routing.capacity import expert_capacity
from sira_jax.routing.config import DISPATCH_ALGORITHMS, EXPERT_DROPOUT_POSITIONS, RoutingConfig
from sira_jax.routing.dispatch import (
    apply_experts,
    choose_algorithm,
    gated_sum,
    join_ranks,
    mix_experts,
)
from sira_jax.routing.grouping import group_tokens, ungroup
from sira_jax.routing.joined import can_join, project_with_router
from sira_jax.routing.losses import load_balance_loss, router_z_loss
from sira_jax.routing.metrics import RouterStats, router_metrics, router_stats, sum_stats
from sira_jax.routing.products import KEPT, keep, project
from sira_jax.routing.router import Routing, route, router_logits

__all__ = [
    "DISPATCH_ALGORITHMS",
    "EXPERT_DROPOUT_POSITIONS",
    "KEPT",
    "RouterStats",
    "Routing",
    "RoutingConfig",
    "apply_experts",
    "can_join",
    "choose_algorithm",
    "expert_capacity",
    "gated_sum",
    "group_tokens",
    "join_ranks",
    "keep",
    "load_balance_loss",
    "mix_experts",
    "project",
    "project_with_router",
    "route",
    "router_logits",
    "router_metrics",
    "router_stats",
    "router_z_loss",
    "sum_stats",
    "ungroup",
]
