"""The low-rank pair that most methods are made of: its parameters, its term, and merging where one pair says it all.

Axis letters: B batch, T length, D features in, F features out, E experts, R rank.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import AdapterConfig, lora_a_init
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.placement import constrain
from sira_jax.routing import keep, project


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """A method that computes, outside training, one low-rank pair a projection, the same for all tokens.

    Such a pair merges into the kernel, and is what a LoRA of other libraries holds.
    """

    @abc.abstractmethod
    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The pair a (D, R), b (R, F) with delta = scale * a @ b. Leading axes, of layers, go along."""

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """W0 + s A B of `as_lora`, summed in float32 and cast back to the kernel's type; leading axes, of layers, go along."""
        a_DR, b_RF = (factor.astype(jnp.float32) for factor in self.as_lora(params))
        return add_to_kernel(kernel_DF, self.scale * (a_DR @ b_RF))


def add_to_kernel(kernel_DF: jax.Array, delta_DF: jax.Array) -> jax.Array:
    """W0 + delta, summed in float32 and cast back to the kernel's type."""
    return (kernel_DF.astype(jnp.float32) + delta_DF).astype(kernel_DF.dtype)


def lora_pair(module: nn.Module, projection: Projection, rank: int) -> tuple[jax.Array, jax.Array]:
    """Declares `module`'s parameters lora_a (D, R) kaiming-uniform and lora_b (R, F) zero, for a projection of shape (D, F)."""
    (d_in, d_out), (in_axis, out_axis) = projection.shape, projection.adapter_axes
    lora_a_DR = module.param(
        "lora_a",
        nn.with_logical_partitioning(lora_a_init, (in_axis, "rank")),
        (d_in, rank),
    )
    lora_b_RF = module.param(
        "lora_b",
        nn.with_logical_partitioning(nn.initializers.zeros, ("rank", out_axis)),
        (rank, d_out),
    )
    return lora_a_DR, lora_b_RF


def expert_pairs(
    module: nn.Module,
    projection: Projection,
    num_experts: int,
    rank: int,
    a_init: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Declares lora_a (E, D, R), drawn by `a_init`, and lora_b (E, R, F) zero; see `lora_pair`."""
    lora_a_EDR = module.param(
        "lora_a",
        nn.with_logical_partitioning(a_init, ("expert", projection.adapter_axes[0], "rank")),
        (num_experts, projection.shape[0], rank),
    )
    return lora_a_EDR, expert_b(module, projection, num_experts, rank)


def expert_b(module: nn.Module, projection: Projection, num_experts: int, rank: int) -> jax.Array:
    """Declares lora_b (E, R, F) zero alone; see `expert_pairs`."""
    return module.param(
        "lora_b",
        nn.with_logical_partitioning(
            nn.initializers.zeros, ("expert", "rank", projection.adapter_axes[1])
        ),
        (num_experts, rank, projection.shape[1]),
    )


def low_rank_term(
    x_BTD: jax.Array,
    a_DR: jax.Array,
    b_RF: jax.Array,
    scale: float | jax.Array,
    dropout_rate: float,
    context: AdapterContext,
) -> jax.Array:
    """scale * B A dropout(x), (B, T, F) in float32; called inside a compact method, whose module the dropout belongs to.

    Args:
      x_BTD: input of the projection.
      a_DR: A; cast to the type of x, as is b_RF.
      b_RF: B.
      scale: s, or what multiplies each of the R components.
      dropout_rate: see AdapterConfig.
      context: says whether there is dropout.
    """
    x_BTD = nn.Dropout(dropout_rate)(x_BTD, deterministic=context.deterministic)
    h_BTR = keep(constrain(project(x_BTD, a_DR.astype(x_BTD.dtype)), "batch", None, None))
    # Scaling here, at width R, spares a pass over the (B, T, F) output.
    h_BTR = (h_BTR * scale).astype(x_BTD.dtype)
    return project(h_BTR, b_RF.astype(x_BTD.dtype))
