"""MELoRA: n mini LoRAs, each on its slice of input and output: y = W0 x + s [B_1 A_1 x_1; ...; B_n A_n x_n]. 2402.17263 [O].

Axis letters: B batch, T length, D features in, F features out, N blocks, d = D / N, f = F / N, R rank, M = N * R joined ranks.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, AdapterFlops, lora_a_init
from sira_jax.adapters.checks import check_count
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import LowRankConfig, low_rank_term
from sira_jax.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class MELoRAConfig(LowRankConfig):
    """Fields of MELoRA: those of AdapterConfig (`rank` is a mini LoRA's, and s = alpha / rank is each one's scale [O]), and

    Attributes:
      num_blocks: mini LoRAs of a projection, n; it must divide D and F [C: 2].
    """

    method: ClassVar[str] = "melora"

    num_blocks: int = 2

    def __post_init__(self):
        check_count("num_blocks", self.num_blocks)
        super().__post_init__()

    def make_module(self) -> nn.Module:
        return MELoRA(config=self, name=ADAPTER)

    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The pair a (D, M), b (M, F) with delta = scale * a @ b: the mini LoRAs as blocks of block-diagonal matrices.

        Leading axes, of layers, go along.
        """
        return _block_diagonal(params["lora_a"]), _block_diagonal(params["lora_b"])

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """Those of the blocks; the products with the zeros between them are not counted."""
        return AdapterFlops(total=2 * self.rank * (d_in + d_out))


def _block_diagonal(blocks_NPQ: jax.Array) -> jax.Array:
    """(..., N, P, Q) to (..., N * P, N * Q) with the blocks on the diagonal and zeros elsewhere."""
    *layers, count, rows, columns = blocks_NPQ.shape
    is_own_NN = jnp.eye(count, dtype=bool)[:, None, :, None]
    spread_NPNQ = jnp.where(is_own_NN, blocks_NPQ[..., None, :], 0)
    return spread_NPNQ.reshape(*layers, count * rows, count * columns)


class MELoRA(nn.Module):
    """Parameters, float32: lora_a (N, d, R) kaiming-uniform with fan-in d [O], lora_b (N, R, f) zero.

    Raises:
      ConfigError: when applied to a projection with a size that num_blocks does not divide.
    """

    config: MELoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the mini LoRAs' outputs side by side."""
        config = self.config
        d_in, d_out = projection.shape
        blocks, rank = config.num_blocks, config.rank
        divides = d_in % blocks == 0 and d_out % blocks == 0
        sizes = (
            f"a divisor of both sizes of {projection.path or 'the projection'}, {d_in} x {d_out}"
        )
        check(divides, "adapter.num_blocks", blocks, sizes)
        y_BTF = projection(x_BTD)
        params = {
            "lora_a": self.param(
                "lora_a",
                nn.with_logical_partitioning(lora_a_init, (None, None, "rank")),
                (blocks, d_in // blocks, rank),
            ),
            "lora_b": self.param(
                "lora_b",
                nn.with_logical_partitioning(nn.initializers.zeros, (None, "rank", None)),
                (blocks, rank, d_out // blocks),
            ),
        }
        # Block-diagonal factors rather than n products: at the ranks the method is for, the passes over the tokens cost
        # more than the products with zeros, and a product batched over the blocks has to move the tokens' axis.
        a_DM, b_MF = config.as_lora(params)
        delta_BTF = low_rank_term(x_BTD, a_DM, b_MF, config.scale, config.dropout_rate, context)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
