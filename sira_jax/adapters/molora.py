"""MoLoRA: y = W0 x + s sum over e of p_e B_e (A_e x), p a softmax over all experts. arXiv 2309.05444 [O].

Axis letters: B batch, T length, D features in, F features out, E experts, R rank, M = E * R joined ranks.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from sira_jax.adapters import mixture
from sira_jax.adapters.base import ADAPTER
from sira_jax.adapters.checks import check_not_negative
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import expert_pairs
from sira_jax.routing import gated_sum, join_ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoLoRAConfig(mixture.MixtureConfig):
    """Fields of MoLoRA: those of MixtureConfig, and

    Attributes:
      a_init_std: standard deviation of A's normal initialisation [O: 0.02].
    """

    method: ClassVar[str] = "molora"
    training_fields: ClassVar[frozenset[str]] = mixture.MixtureConfig.training_fields | {
        "a_init_std"
    }

    a_init_std: float = 0.02

    def __post_init__(self):
        check_not_negative("a_init_std", self.a_init_std)
        super().__post_init__()

    def make_module(self) -> nn.Module:
        return MoLoRA(config=self, name=ADAPTER)

    def expert_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out)


class MoLoRA(nn.Module):
    """Parameters, float32: router (D, E) normal, lora_a (E, D, R) normal, lora_b (E, R, F) zero.

    Sows into `losses` the weighted load-balancing loss (a scalar) and into `metrics` the router's statistics.
    """

    config: MoLoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the mixture of the experts' outputs."""
        config = self.config
        y_BTF = projection(x_BTD)
        a_init = nn.initializers.normal(config.a_init_std)
        lora_a_EDR, lora_b_ERF = expert_pairs(
            self, projection, config.num_experts, config.rank, a_init
        )
        hidden_BTM, gate = mixture.route_and_project(
            self, x_BTD, join_ranks(lora_a_EDR), projection, config, context
        )
        delta_BTF = gated_sum(hidden_BTM, gate.gates_BTE * config.scale, lora_b_ERF, x_BTD.dtype)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
