"""Sparse routing of tokens to low-rank experts."""

from sira_jax.routing.capacity import expert_capacity
from sira_jax.routing.config import DISPATCH_ALGORITHMS, EXPERT_DROPOUT_POSITIONS, RoutingConfig
from sira_jax.routing.dispatch import apply_experts, choose_algorithm, mix_experts
from sira_jax.routing.grouping import group_tokens, ungroup
from sira_jax.routing.losses import load_balance_loss, router_z_loss
from sira_jax.routing.metrics import RouterStats, router_metrics, router_stats
from sira_jax.routing.products import project
from sira_jax.routing.router import Routing, route, router_logits

__all__ = [
    "DISPATCH_ALGORITHMS",
    "EXPERT_DROPOUT_POSITIONS",
    "RouterStats",
    "Routing",
    "RoutingConfig",
    "apply_experts",
    "choose_algorithm",
    "expert_capacity",
    "group_tokens",
    "load_balance_loss",
    "mix_experts",
    "project",
    "route",
    "router_logits",
    "router_metrics",
    "router_stats",
    "router_z_loss",
    "ungroup",
]
