"""SiRA: y = W0 x + sum over e of G[e] s B_e (A_e x), G sparse, capacity-limited, with expert dropout. arXiv 2311.09179.

Axis letters: B batch, T length, G routing groups, S tokens a group, D features in, F features out, E experts, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax import routing
from sira_jax.adapters.base import ADAPTER, AdapterConfig, AdapterFlops, lora_a_init
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import expert_pairs
from sira_jax.errors import MergeError, check

ROUTER_REGULARIZERS = ("load_balance", "expert_dropout", "smoe_dropout", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiRAConfig(AdapterConfig, routing.RoutingConfig):
    """Fields of SiRA: those of AdapterConfig and of RoutingConfig (which carries the marks [P], [S], [C]), and

    Attributes:
      router_regularizer: what keeps the router from a few experts, one of ROUTER_REGULARIZERS or a set of them [P: the
        paper's ablation]: "load_balance" (the loss, by `load_balance_loss_weight`), "expert_dropout" (by
        `expert_dropout_rate`), "smoe_dropout" (a random router that is not trained, and k growing linearly from 1 to E over
        training; evaluation takes all E. arXiv 2303.01610), or "none". What is not named is off, whatever its weight or rate.
    """

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

    # A mixture without the regulariser that is the paper's point is no SiRA: the rate is not 0 here [C].
    expert_dropout_rate: float = 0.1
    router_regularizer: tuple[str, ...] | str = ("load_balance", "expert_dropout")

    def __post_init__(self):
        names = self.router_regularizer
        names = (names,) if isinstance(names, str) else names
        known = isinstance(names, list | tuple | set | frozenset) and all(
            name in ROUTER_REGULARIZERS for name in names
        )
        check(
            known and len(names) > 0 and ("none" not in names or set(names) == {"none"}),
            "adapter.router_regularizer",
            self.router_regularizer,
            f"one of {', '.join(ROUTER_REGULARIZERS)}, or a set of them without none",
        )
        ordered = tuple(name for name in ROUTER_REGULARIZERS if name in names)
        object.__setattr__(self, "router_regularizer", ordered)
        routing.RoutingConfig.__post_init__(self)
        AdapterConfig.__post_init__(self)

    @property
    def trained_rank(self) -> int:
        return self.num_experts * self.rank

    def check_shard(self, rows: int, length: int) -> None:
        tokens, size = rows * length, self.group_size
        check(
            size is None or tokens % size == 0,
            "adapter.group_size",
            size,
            f"None, or a divisor of the {rows} x {length} tokens that a device has of a batch, so that no routing group lies on"
            " two",
        )

    @property
    def has_random_router(self) -> bool:
        """Whether the router stays as it was drawn (SMoE-dropout)."""
        return "smoe_dropout" in self.router_regularizer

    def regularized(self) -> "SiRAConfig":
        """The config with the weights and rates of unnamed regularisers at 0, and k = E under SMoE-dropout."""
        changes: dict[str, float | int] = {}
        if "load_balance" not in self.router_regularizer:
            changes["load_balance_loss_weight"] = 0.0
        if "expert_dropout" not in self.router_regularizer:
            changes["expert_dropout_rate"] = 0.0
        if self.has_random_router:
            changes["num_selected_experts"] = self.num_experts
        return dataclasses.replace(self, **changes)

    def make_module(self) -> nn.Module:
        return SiRA(config=self, name=ADAPTER)

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """Always raises MergeError: which experts act depends on the token."""
        raise MergeError(
            "adapter.method='sira' cannot be merged into a plain kernel: the router picks other experts for each token,"
            " so no single matrix computes the same; save the adapter beside the base instead"
        )

    def count_parameters(self, d_in: int, d_out: int) -> int:
        router = 0 if self.has_random_router else d_in * self.num_experts
        return router + self.num_experts * self.rank * (d_in + d_out)

    def active_parameters(self, d_in: int, d_out: int) -> int:
        """The router, where it is trained, and k expert pairs; under SMoE-dropout k is (E + 1) / 2, its mean."""
        experts, used = self.num_experts, self.num_selected_experts
        pairs = used if not self.has_random_router else (experts + 1) / 2
        unused = (experts - pairs) * self.rank * (d_in + d_out)
        return self.count_parameters(d_in, d_out) - round(unused)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The router and k expert pairs; the masked algorithm computes all E pairs, which is cheaper in time.

        Under SMoE-dropout k is E, as at the end of training.
        """
        router = 2 * d_in * self.num_experts
        experts = 2 * self.regularized().num_selected_experts * self.rank * (d_in + d_out)
        return AdapterFlops(total=router + experts, router=router)


def growing_choices(config: SiRAConfig, context: AdapterContext) -> jax.Array | None:
    """SMoE-dropout's k of this step, int32 from 1 to E, each for an equal share of the training; None where k is fixed."""
    if not config.has_random_router or context.deterministic or context.progress is None:
        return None
    grown = 1 + jnp.floor(context.progress * config.num_experts).astype(jnp.int32)
    return jnp.minimum(grown, config.num_experts)


class SiRA(nn.Module):
    """Parameters, float32: router (D, E) normal, lora_a (E, D, R) kaiming-uniform, lora_b (E, R, F) zero.

    Under SMoE-dropout the router is `buffer_router`.

    Sows into `losses` the weighted load-balancing and z-losses (scalars) and into `metrics` the router's statistics.
    """

    config: SiRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the experts' mixture."""
        config = self.config.regularized()
        y_BTF = projection(x_BTD)
        experts, rank = config.num_experts, config.rank
        router_DE = self.param(
            "buffer_router" if config.has_random_router else "router",
            nn.with_logical_partitioning(
                nn.initializers.normal(config.router_init_std),
                (projection.adapter_axes[0], "expert"),
            ),
            (projection.shape[0], experts),
        )
        lora_a_EDR, lora_b_ERF = expert_pairs(self, projection, experts, rank, lora_a_init)
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
            active_choices=growing_choices(config, context),
        )
        loss = jnp.float32(0)
        if config.load_balance_loss_weight:
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
