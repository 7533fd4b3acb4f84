"""SiRA: y = W0 x + sum over e of G[e] s B_e (A_e x), G sparse, capacity-limited, with expert dropout. arXiv 2311.09179.

Axis letters: B batch, T length, G routing groups, S tokens a group, D features in, F features out, E experts, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax

from sira_jax import routing
from sira_jax.adapters.base import ADAPTER, AdapterConfig, AdapterFlops, lora_a_init
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.errors import MergeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiRAConfig(AdapterConfig, routing.RoutingConfig):
    """Fields of SiRA: those of AdapterConfig and of RoutingConfig (which carries the marks [P], [S], [C])."""

    method: ClassVar[str] = "sira"
    config_section: ClassVar[str] = "adapter"
    training_fields: ClassVar[frozenset[str]] = AdapterConfig.training_fields | {
        "capacity_factor",
        "dispatch",
        "eval_capacity_factor",
        "expert_dropout_position",
        "expert_dropout_rate",
        "load_balance_loss_weight",
        "router_init_std",
        "router_z_loss_weight",
    }

    def __post_init__(self):
        routing.RoutingConfig.__post_init__(self)
        AdapterConfig.__post_init__(self)

    def make_module(self) -> nn.Module:
        return SiRA(config=self, name=ADAPTER)

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """Always raises MergeError: which experts act depends on the token."""
        raise MergeError(
            "adapter.method='sira' cannot be merged into a plain kernel: the router picks other experts for each token,"
            " so no single matrix computes the same; save the adapter beside the base instead"
        )

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.num_experts * (self.rank * (d_in + d_out) + d_in)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The router and k expert pairs; the masked algorithm computes all E pairs, which is cheaper in time."""
        router = 2 * d_in * self.num_experts
        experts = 2 * self.num_selected_experts * self.rank * (d_in + d_out)
        return AdapterFlops(total=router + experts, router=router)


class SiRA(nn.Module):
    """Parameters, float32: router (D, E) normal, lora_a (E, D, R) kaiming-uniform, lora_b (E, R, F) zero.

    Sows into `losses` the weighted load-balancing and z-losses (scalars) and into `metrics` the router's statistics.
    """

    config: SiRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the experts' mixture."""
        config = self.config
        d_in, d_out = projection.shape
        y_BTF = projection(x_BTD)
        experts, rank = config.num_experts, config.rank
        router_DE = self.param(
            "router",
            nn.with_logical_partitioning(
                nn.initializers.normal(config.router_init_std), ("adapter_in", "expert")
            ),
            (d_in, experts),
        )
        lora_a_EDR = self.param(
            "lora_a",
            nn.with_logical_partitioning(lora_a_init, ("expert", "adapter_in", "rank")),
            (experts, d_in, rank),
        )
        lora_b_ERF = self.param(
            "lora_b",
            nn.with_logical_partitioning(nn.initializers.zeros, ("expert", "rank", "adapter_out")),
            (experts, rank, d_out),
        )
        valid_BT = context.valid_or_all(x_BTD.shape[:2])
        x_GSD, valid_GS = routing.group_tokens(x_BTD, valid_BT, config.group_size)
        training = not context.deterministic
        dropped_x_GSD = None
        if training and config.dropout_rate > 0:
            dropped_x_GSD = nn.Dropout(config.dropout_rate)(x_GSD, deterministic=False)
        needs_rng = training and config.expert_dropout_rate > 0
        delta_GSF, routed = routing.mix_experts(
            x_GSD,
            valid_GS,
            router_DE,
            lora_a_EDR,
            lora_b_ERF,
            config,
            scale=config.scale,
            deterministic=context.deterministic,
            rng=self.make_rng("expert_dropout") if needs_rng else None,
            expert_input_GSD=dropped_x_GSD,
        )
        loss = config.load_balance_loss_weight * routing.load_balance_loss(routed)
        if config.router_z_loss_weight:
            z_loss = routing.router_z_loss(routed.logits_GSE, valid_GS)
            loss = loss + config.router_z_loss_weight * z_loss
        self.sow("losses", "router", loss)
        if self.is_mutable_collection("metrics"):
            task_ids_GS = None
            if context.num_tasks and context.task_ids_BT is not None:
                task_ids_GS, _ = routing.group_tokens(
                    context.task_ids_BT, valid_BT, config.group_size
                )
            num_tasks = 0 if task_ids_GS is None else context.num_tasks
            stats = routing.router_stats(routed, task_ids_GS, num_tasks)
            self.sow("metrics", "router", stats)
        delta_BTF = routing.ungroup(delta_GSF, *x_BTD.shape[:2])
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
