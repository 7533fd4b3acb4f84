"""MultiLoRA: y = W0 x + s sum over n branches of diag(c_i) B_i A_i x, c_i zero at the start. arXiv 2311.11501 [S].

Axis letters: B batch, T length, D features in, F features out, N branches, R rank, M = N * R joined ranks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, AdapterFlops
from sira_jax.adapters.checks import check_count
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import LowRankConfig, low_rank_term
from sira_jax.errors import check, is_finite_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiLoRAConfig(LowRankConfig):
    """Fields of MultiLoRA: those of AdapterConfig (`rank` is a branch's; s = alpha / rank applies to each branch [C]), and

    Attributes:
      num_branches: parallel low-rank pairs, n [C: 2].
      init_scale: A_i and B_i start as U(-b, b), b = init_scale / sqrt(fan-in), the fan-in of A being D and of B the rank:
        kaiming-uniform [S], at 1 with LoRA's gain (a = sqrt 5) and at sqrt(6) with that of a ReLU (a = 0) [C: 1].
    """

    method: ClassVar[str] = "multilora"
    training_fields: ClassVar[frozenset[str]] = LowRankConfig.training_fields | {"init_scale"}

    num_branches: int = 2
    init_scale: float = 1.0

    def __post_init__(self):
        check_count("num_branches", self.num_branches)
        is_allowed = is_finite_number(self.init_scale) and self.init_scale > 0
        check(is_allowed, "adapter.init_scale", self.init_scale, "a finite number over 0")
        super().__post_init__()

    @property
    def trained_rank(self) -> int:
        return self.num_branches * self.rank

    def make_module(self) -> nn.Module:
        return MultiLoRA(config=self, name=ADAPTER)

    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The pair a (D, M), b (M, F) with delta = scale * a @ b: the branches side by side, their scales in b.

        Leading axes, of layers, go along.
        """
        a_NDR, b_NRF, scale_NF = (params[name] for name in ("lora_a", "lora_b", "branch_scale"))
        *layers, branches, d_in, rank = a_NDR.shape
        a_DM = jnp.swapaxes(a_NDR, -3, -2).reshape(*layers, d_in, branches * rank)
        scaled_NRF = b_NRF * scale_NF[..., None, :]
        return a_DM, scaled_NRF.reshape(*layers, branches * rank, b_NRF.shape[-1])

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.num_branches * (self.rank * (d_in + d_out) + d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The n pairs; their scales are multiplied into B once a batch and not counted."""
        return AdapterFlops(total=2 * self.num_branches * self.rank * (d_in + d_out))


class MultiLoRA(nn.Module):
    """Parameters, float32: lora_a (N, D, R) and lora_b (N, R, F) kaiming-uniform, branch_scale (N, F) zero."""

    config: MultiLoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the branches' sum."""
        config = self.config
        (d_in, d_out), (in_axis, out_axis) = projection.shape, projection.adapter_axes
        branches, rank = config.num_branches, config.rank
        y_BTF = projection(x_BTD)
        params = {
            "lora_a": self.param(
                "lora_a",
                nn.with_logical_partitioning(self._uniform, (None, in_axis, "rank")),
                (branches, d_in, rank),
            ),
            "lora_b": self.param(
                "lora_b",
                nn.with_logical_partitioning(self._uniform, (None, "rank", out_axis)),
                (branches, rank, d_out),
            ),
            "branch_scale": self.param(
                "branch_scale",
                nn.with_logical_partitioning(nn.initializers.zeros, (None, out_axis)),
                (branches, d_out),
            ),
        }
        # The scales act on B and not on the branches' outputs, so that all branches are one product.
        a_DM, b_MF = config.as_lora(params)
        delta_BTF = low_rank_term(x_BTD, a_DM, b_MF, config.scale, config.dropout_rate, context)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)

    def _uniform(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """U(-b, b), b = init_scale / sqrt(fan-in); `shape` ends in (fan-in, fan-out)."""
        bound = self.config.init_scale * shape[-2] ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)
