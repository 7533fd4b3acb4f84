"""LoRA: y = W0 x + s B A dropout(x), s = alpha / rank. arXiv 2106.09685 [O].

Axis letters: B batch, T length, D features in, F features out, R rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax

from sira_jax.adapters.base import ADAPTER, AdapterFlops
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import LowRankConfig, lora_pair, low_rank_term


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Fields of LoRA: those of AdapterConfig."""

    method: ClassVar[str] = "lora"

    def make_module(self) -> nn.Module:
        return LoRA(config=self, name=ADAPTER)

    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """A and B as they are."""
        return params["lora_a"], params["lora_b"]

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
        config = self.config
        y_BTF = projection(x_BTD)
        pair = lora_pair(self, projection, config.rank)
        delta_BTF = low_rank_term(x_BTD, *pair, config.scale, config.dropout_rate, context)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
