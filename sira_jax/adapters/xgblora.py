"""XGBLoRA: stages of rank-1 LoRA on a few random layers, each merged before the next. arXiv 2410.19694.

y = (W0 + M) x + active s B (A x), see `merging_chain`. [S] a secondary source, [C] our choice.

Axis letters: B batch, T length, D features in, F features out, R rank, L layers.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, AdapterFlops, lora_a_init
from sira_jax.adapters.checks import check_count, check_not_negative
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import lora_pair, low_rank_term
from sira_jax.adapters.merging_chain import Leaves, MergingChainConfig, project_with_sum
from sira_jax.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class XGBLoRAConfig(MergingChainConfig):
    """Fields of XGBLoRA: those of MergingChainConfig, with rank 1 [S] and alpha 2, which is LoRA's default scale [C], and

    Attributes:
      num_layers_per_stage: layers that a stage trains, L_s, drawn without replacement and the same for all projections
        [S: some random ones; C: 2]. More than the model has are refused at initialisation.
      norm_penalty_weight: weight of the squared Frobenius norm of the stage's product s A B, a mean over all adapted
        projections of all layers, 0 in those that the stage does not train [S: a penalty is optional; C: which, and 0].
    """

    method: ClassVar[str] = "xgblora"
    training_fields: ClassVar[frozenset[str]] = MergingChainConfig.training_fields | {
        "norm_penalty_weight",
        "num_layers_per_stage",
    }
    whole_model_fields: ClassVar[frozenset[str]] = MergingChainConfig.whole_model_fields | {
        "num_layers_per_stage"
    }

    rank: int = 1
    alpha: float = 2.0
    num_layers_per_stage: int = 2
    norm_penalty_weight: float = 0.0

    def __post_init__(self):
        check_count("num_layers_per_stage", self.num_layers_per_stage)
        check_not_negative("norm_penalty_weight", self.norm_penalty_weight)
        super().__post_init__()

    def make_module(self) -> nn.Module:
        return XGBLoRA(config=self, name=ADAPTER)

    def delta(self, leaves: Leaves) -> jax.Array:
        scale = self.scale * leaves["buffer_active"][..., None, None]
        return scale * (leaves["lora_a"] @ leaves["lora_b"])

    def active_layers(self, num_layers: int) -> int:
        """Those of a stage: elsewhere its product is 0."""
        return min(self.num_layers_per_stage, num_layers)

    def choose_layers(self, key: jax.Array, num_layers: int) -> jax.Array:
        """L_s random layers.

        Raises:
          ConfigError: the model has fewer.
        """
        chosen = self.num_layers_per_stage
        check(
            chosen <= num_layers,
            "adapter.num_layers_per_stage",
            chosen,
            f"at most the model's {num_layers} layers",
        )
        return (jax.random.permutation(key, num_layers) < chosen).astype(jnp.float32)

    def fresh_stage(self, leaves: Leaves, key: jax.Array, active: jax.Array) -> dict[str, Any]:
        # A zero A, as B, in layers that are not trained: weight decay cannot move it either.
        return {
            "lora_a": active * lora_a_init(key, leaves["lora_a"].shape),
            "lora_b": jnp.zeros_like(leaves["lora_b"]),
            "buffer_active": active,
        }

    def count_parameters(self, d_in: int, d_out: int) -> int:
        """Of a layer, whether the stage trains it or not; `buffer_merged` does not count."""
        return self.rank * (d_in + d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The low-rank products; taking the sum W0 + M costs d_in * d_out additions a pass, whatever the tokens."""
        return AdapterFlops(total=2 * self.rank * (d_in + d_out))


class XGBLoRA(nn.Module):
    """Parameters, float32: lora_a (D, R) kaiming-uniform in layers of the stage and 0 in others, lora_b (R, F) zero.

    Buffers, float32: buffer_active, a scalar, 1 in layers of the stage; buffer_merged (D, F), zero.
    Sows into `losses` the weighted norm penalty (scalar), if its weight is not 0.
    """

    config: XGBLoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The merged projection's output (B, T, F) plus the stage's low-rank term."""
        config = self.config
        y_BTF = project_with_sum(self, x_BTD, projection)
        lora_a_DR, lora_b_RF = lora_pair(self, projection, config.rank)
        active = self.param(
            "buffer_active", nn.with_logical_partitioning(nn.initializers.ones, ()), ()
        )
        delta_BTF = low_rank_term(
            x_BTD, lora_a_DR, lora_b_RF, config.scale * active, config.dropout_rate, context
        )
        if config.norm_penalty_weight:
            # ||A B||^2 = <A^T A, B B^T>, without the (D, F) product.
            squared = jnp.sum((lora_a_DR.T @ lora_a_DR) * (lora_b_RF @ lora_b_RF.T))
            squared = active * config.scale**2 * squared
            self.sow("losses", "norm_penalty", config.norm_penalty_weight * squared)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
