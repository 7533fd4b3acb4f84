"""MALoRA: y = W0 x + s sum over e of p_e B_e P_e (S x): MoLoRA whose experts share A's subspace S. arXiv 2410.22782 [S].

Axis letters: B batch, T length, D features in, F features out, E experts, J width of the shared subspace, R rank,
M = E * R joined ranks.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from sira_jax.adapters import mixture
from sira_jax.adapters.base import ADAPTER, lora_a_init
from sira_jax.adapters.checks import check_count, check_not_negative
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import expert_b
from sira_jax.routing import gated_sum, join_ranks, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class MALoRAConfig(mixture.MixtureConfig):
    """Fields of MALoRA: those of MixtureConfig, `rank` being the experts' rank r_hi, and

    Attributes:
      shared_dim: d', the width J of the shared subspace [C: 8]. The rank of an expert is the smaller of it and `rank`.
      p_init_std: standard deviation of P's normal initialisation; None is 1 / sqrt(shared_dim), with which S P has the
        variance of a LoRA's A, 1 / (3 D) [C].
    """

    method: ClassVar[str] = "malora"
    training_fields: ClassVar[frozenset[str]] = mixture.MixtureConfig.training_fields | {
        "p_init_std"
    }

    shared_dim: int = 8
    p_init_std: float | None = None

    def __post_init__(self):
        check_count("shared_dim", self.shared_dim)
        if self.p_init_std is not None:
            check_not_negative("p_init_std", self.p_init_std)
        super().__post_init__()

    def make_module(self) -> nn.Module:
        return MALoRA(config=self, name=ADAPTER)

    def shared_parameters(self, d_in: int, d_out: int) -> int:
        del d_out
        return d_in * self.shared_dim

    def expert_parameters(self, d_in: int, d_out: int) -> int:
        del d_in
        return self.rank * (self.shared_dim + d_out)


class MALoRA(nn.Module):
    """Parameters, float32: router (D, E) normal, shared_a (D, J) kaiming-uniform, expert_p (E, J, R) normal,
    lora_b (E, R, F) zero.

    Sows into `losses` the weighted load-balancing loss (a scalar) and into `metrics` the router's statistics.
    """

    config: MALoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the mixture of the experts' outputs."""
        config = self.config
        y_BTF = projection(x_BTD)
        p_std = config.shared_dim**-0.5 if config.p_init_std is None else config.p_init_std
        shared_a_DJ = self.param(
            "shared_a",
            nn.with_logical_partitioning(lora_a_init, (projection.adapter_axes[0], "rank")),
            (projection.shape[0], config.shared_dim),
        )
        expert_p_EJR = self.param(
            "expert_p",
            nn.with_logical_partitioning(nn.initializers.normal(p_std), ("expert", None, "rank")),
            (config.num_experts, config.shared_dim, config.rank),
        )
        lora_b_ERF = expert_b(self, projection, config.num_experts, config.rank)
        shared_BTJ, gate = mixture.route_and_project(
            self, x_BTD, shared_a_DJ, projection, config, context
        )
        expert_p_JM = join_ranks(expert_p_EJR).astype(x_BTD.dtype)
        hidden_BTM = project(shared_BTJ.astype(x_BTD.dtype), expert_p_JM)
        delta_BTF = gated_sum(hidden_BTM, gate.gates_BTE * config.scale, lora_b_ERF, x_BTD.dtype)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
