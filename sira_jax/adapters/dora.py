"""DoRA (weight-decomposed): W' = m V / ||V||, V = W0 + s A B, norms of the weights into each output. arXiv 2402.09353 [O].

Axis letters: B batch, T length, D features in, F features out, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, AdapterFlops
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import LowRankConfig, lora_pair, low_rank_term
from sira_jax.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAConfig(LowRankConfig):
    """Fields of DoRA: those of AdapterConfig, and

    Attributes:
      norm_gradient: differentiate ||V|| too. Off, it is a constant in the backward pass, as in the paper's section 4.3 and in
        PEFT [O], which spares most of the method's cost.
    """

    method: ClassVar[str] = "dora"
    training_fields: ClassVar[frozenset[str]] = LowRankConfig.training_fields | {"norm_gradient"}

    norm_gradient: bool = False

    def __post_init__(self):
        is_bool = isinstance(self.norm_gradient, bool)
        check(is_bool, "adapter.norm_gradient", self.norm_gradient, "True or False")
        super().__post_init__()

    def make_module(self) -> nn.Module:
        return DoRA(config=self, name=ADAPTER)

    def column_ratio(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """m / ||V|| (F,), float32, where m = ||W0|| + magnitude_delta; leading axes, of layers, go along.

        It is exactly 1 where B and the delta are 0. Where V is 0 it is 1: a column without a direction stays as it is.
        """
        frozen_F, adapted_F = squared_norms(
            kernel_DF, params["lora_a"], params["lora_b"], self.scale
        )
        if not self.norm_gradient:
            frozen_F, adapted_F = jax.lax.stop_gradient((frozen_F, adapted_F))
        has_norm_F, has_start_F = adapted_F > 0, frozen_F > 0
        adapted_F = jnp.where(has_norm_F, adapted_F, 1.0)
        # The root of the quotient is exactly 1 where the two sums are one number; the quotient of the roots need not be.
        start_F = jnp.sqrt(jnp.where(has_start_F, frozen_F, adapted_F) / adapted_F)
        start_F = jnp.where(has_start_F, start_F, 0.0)
        ratio_F = start_F + params["magnitude_delta"] * jax.lax.rsqrt(adapted_F)
        return jnp.where(has_norm_F, ratio_F, 1.0)

    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The pair inside V; the magnitude is apart."""
        return params["lora_a"], params["lora_b"]

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """m V / ||V||, computed in float32 and cast back to the kernel's type; leading axes, of layers, go along."""
        delta_DF = params["lora_a"].astype(jnp.float32) @ params["lora_b"].astype(jnp.float32)
        v_DF = kernel_DF.astype(jnp.float32) + self.scale * delta_DF
        ratio_F = self.column_ratio(params, kernel_DF)
        return (v_DF * ratio_F[..., None, :]).astype(kernel_DF.dtype)

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out) + d_out

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The low-rank pair and one multiplication an output; the norms are computed once a batch and not counted."""
        return AdapterFlops(total=2 * self.rank * (d_in + d_out) + d_out)


def squared_norms(
    kernel_DF: jax.Array, a_DR: jax.Array, b_RF: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """(||W0||^2, ||W0 + scale A B||^2) of each column, (F,) float32, without forming A B; leading axes go along.

    ||W0||^2 + 2 s <W0, A B> + s^2 ||A B||^2 needs W0^T A and A^T A alone: 2 D F (R + 1) FLOPs, whatever the number of tokens.
    """
    kernel_DF = kernel_DF.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    frozen_F = jnp.sum(kernel_DF * kernel_DF, axis=-2)
    shadow_RF = jnp.einsum("...dr,...df->...rf", a_DR, kernel_DF, precision=highest)
    gram_RR = jnp.einsum("...dr,...dq->...rq", a_DR, a_DR, precision=highest)
    own_RF = jnp.matmul(gram_RR, b_RF, precision=highest)
    added_F = jnp.sum((2 * scale * shadow_RF + scale**2 * own_RF) * b_RF, axis=-2)
    return frozen_F, frozen_F + added_F


class DoRA(nn.Module):
    """Parameters, float32: lora_a (D, R) kaiming-uniform, lora_b (R, F) zero, magnitude_delta (F,) zero.

    The magnitude is m = ||W0|| + magnitude_delta, so that a fresh adapter needs no base; PEFT stores m itself.
    """

    config: DoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """x m V / ||V|| + bias, (B, T, F). Dropout acts on the input of the low-rank pair alone [O]."""
        config = self.config
        lora_a_DR, lora_b_RF = lora_pair(self, projection, config.rank)
        magnitude_delta_F = self.param(
            "magnitude_delta",
            nn.with_logical_partitioning(nn.initializers.zeros, projection.adapter_axes[1:]),
            projection.shape[1:],
        )
        params = {
            "lora_a": lora_a_DR,
            "lora_b": lora_b_RF,
            "magnitude_delta": magnitude_delta_F,
        }
        ratio_F = config.column_ratio(params, projection.kernel_DF)
        y_BTF = projection.product(x_BTD)
        delta_BTF = low_rank_term(
            x_BTD, lora_a_DR, lora_b_RF, config.scale, config.dropout_rate, context
        )
        # In float32: a bfloat16 near 1 has but two or three digits, and the ratio stays near 1.
        scaled_BTF = (y_BTF.astype(jnp.float32) + delta_BTF) * ratio_F
        return projection.add_bias(scaled_BTF.astype(y_BTF.dtype))
