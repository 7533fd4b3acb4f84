"""AdaMix: y = W0 x + s B_j (A_i x), i and j drawn anew for each forward pass in training, averages outside it.

arXiv 2205.12410; [P] the paper, [O] the official code, [C] our choice.

Axis letters: B batch, T length, D features in, F features out, E experts, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import (
    ADAPTER,
    AdapterFlops,
    SecondPass,
    lora_a_init,
)
from sira_jax.adapters.checks import check_count, check_not_negative
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import LowRankConfig, low_rank_term
from sira_jax.errors import check

CONSISTENCY_GRADIENTS = ("first", "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMixConfig(LowRankConfig):
    """Fields of AdaMix: those of AdapterConfig, and

    Attributes:
      num_experts: E [O: 4 for understanding tasks, 8 for generation].
      share_b: one B, the projection up, for all experts of a projection [O]; otherwise each expert has its own, drawn
        independently of A [O].
      consistency_loss_weight: weight of the symmetric KL divergence between two stochastic forward passes, a mean over the
        target tokens [P: the loss has no weight, that is 1; O: 1 for understanding tasks, 100 for generation]. 0 leaves out
        the second pass.
      consistency_gradient: "both" differentiates the divergence through both passes; "first" through the first alone, with
        twice the weight, which is the same in expectation and costs no second backward pass [C]. The official code does both
        passes, with the target distribution of each divergence held constant.
    """

    method: ClassVar[str] = "adamix"
    training_fields: ClassVar[frozenset[str]] = LowRankConfig.training_fields | {
        "consistency_gradient",
        "consistency_loss_weight",
    }
    whole_model_fields: ClassVar[frozenset[str]] = frozenset(
        {"consistency_gradient", "consistency_loss_weight"}
    )

    num_experts: int = 4
    share_b: bool = True
    consistency_loss_weight: float = 1.0
    consistency_gradient: str = "first"

    def __post_init__(self):
        check_count("num_experts", self.num_experts)
        check(isinstance(self.share_b, bool), "adapter.share_b", self.share_b, "True or False")
        check_not_negative("consistency_loss_weight", self.consistency_loss_weight)
        check(
            self.consistency_gradient in CONSISTENCY_GRADIENTS,
            "adapter.consistency_gradient",
            self.consistency_gradient,
            f"one of {', '.join(CONSISTENCY_GRADIENTS)}",
        )
        super().__post_init__()

    @property
    def trained_rank(self) -> int:
        return self.num_experts * self.rank

    @property
    def second_pass(self) -> SecondPass | None:
        """The consistency term; None at weight 0."""
        if not self.consistency_loss_weight:
            return None
        return SecondPass(
            weight=self.consistency_loss_weight, both_gradients=self.consistency_gradient == "both"
        )

    def make_module(self) -> nn.Module:
        return AdaMix(config=self, name=ADAPTER)

    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The one pair that evaluation uses: (mean A (..., D, R), mean B (..., R, F)), uniform over the experts [O]."""
        lora_b = params["lora_b"]
        lora_b_RF = lora_b if self.share_b else jnp.mean(lora_b, axis=-3)
        return jnp.mean(params["lora_a"], axis=-3), lora_b_RF

    def count_parameters(self, d_in: int, d_out: int) -> int:
        num_b = 1 if self.share_b else self.num_experts
        return self.rank * (self.num_experts * d_in + num_b * d_out)

    def active_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """Of one forward pass; the consistency term makes a training step run two, through the whole model."""
        return AdapterFlops(total=2 * self.rank * (d_in + d_out))


def equal_experts_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
    """E copies of one draw of LoRA's A, shape (E, D, R): the experts part in training [O]."""
    return jnp.broadcast_to(lora_a_init(key, shape[1:], dtype), shape)


class AdaMix(nn.Module):
    """Parameters, float32: lora_a (E, D, R) equal copies of one kaiming-uniform draw, lora_b (R, F) or (E, R, F) zero.

    In training the indices of A and B are drawn uniformly and independently from the RNG stream `expert_choice`: one for the
    whole batch, anew for each projection and forward pass.
    """

    config: AdaMixConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus one pair's low-rank term."""
        config = self.config
        (d_in, d_out), (in_axis, out_axis) = projection.shape, projection.adapter_axes
        y_BTF = projection(x_BTD)
        experts, rank = config.num_experts, config.rank
        lora_a_EDR = self.param(
            "lora_a",
            nn.with_logical_partitioning(equal_experts_init, ("expert", in_axis, "rank")),
            (experts, d_in, rank),
        )
        b_shape, b_axes = (rank, d_out), ("rank", out_axis)
        if not config.share_b:
            b_shape, b_axes = (experts, *b_shape), ("expert", *b_axes)
        lora_b = self.param(
            "lora_b", nn.with_logical_partitioning(nn.initializers.zeros, b_axes), b_shape
        )
        if context.deterministic:
            lora_a_DR, lora_b_RF = config.as_lora({"lora_a": lora_a_EDR, "lora_b": lora_b})
        else:
            index_a, index_b = jax.random.randint(self.make_rng("expert_choice"), (2,), 0, experts)
            lora_a_DR = jax.lax.dynamic_index_in_dim(lora_a_EDR, index_a, keepdims=False)
            lora_b_RF = lora_b
            if not config.share_b:
                lora_b_RF = jax.lax.dynamic_index_in_dim(lora_b, index_b, keepdims=False)
        delta_BTF = low_rank_term(
            x_BTD, lora_a_DR, lora_b_RF, config.scale, config.dropout_rate, context
        )
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
