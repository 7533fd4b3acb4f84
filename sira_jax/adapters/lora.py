"""LoRA: y = W0 x + s B A dropout(x), s = alpha / rank. arXiv 2106.09685 [O].

Axis letters: B batch, T length, D features in, F features out, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, AdapterConfig, AdapterFlops, lora_a_init
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.trees import add_to_kernel
from sira_jax.routing import project


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Fields of LoRA: those of AdapterConfig."""

    method: ClassVar[str] = "lora"

    def make_module(self) -> nn.Module:
        return LoRA(config=self, name=ADAPTER)

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """W0 + s A B, summed in float32 and cast back to the kernel's type; leading axes, of layers, go along."""
        delta_DF = params["lora_a"].astype(jnp.float32) @ params["lora_b"].astype(jnp.float32)
        return add_to_kernel(kernel_DF, self.scale * delta_DF)

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        return AdapterFlops(total=2 * self.rank * (d_in + d_out))


class LoRA(nn.Module):
    """Parameters: lora_a (D, R) kaiming-uniform, lora_b (R, F) zero, both float32."""

    config: LoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the low-rank term."""
        d_in, d_out = projection.shape
        y_BTF = projection(x_BTD)
        rank = self.config.rank
        lora_a_DR = self.param(
            "lora_a",
            nn.with_logical_partitioning(lora_a_init, ("adapter_in", "rank")),
            (d_in, rank),
        )
        lora_b_RF = self.param(
            "lora_b",
            nn.with_logical_partitioning(nn.initializers.zeros, ("rank", "adapter_out")),
            (rank, d_out),
        )
        x_BTD = nn.Dropout(self.config.dropout_rate)(x_BTD, deterministic=context.deterministic)
        h_BTR = project(x_BTD, lora_a_DR.astype(x_BTD.dtype))
        # Scaling here, at width R, spares a pass over the (B, T, F) output.
        h_BTR = (h_BTR * self.config.scale).astype(x_BTD.dtype)
        delta_BTF = project(h_BTR, lora_b_RF.astype(x_BTD.dtype))
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
