"""RAC-LoRA: a chain of LoRA stages with one factor random and frozen, the other trained from zero. arXiv 2410.08305.

y = (W0 + M) x + s B (A x), see `merging_chain`. [S] a secondary source, [C] our choice.

Axis letters: B batch, T length, D features in, F features out, R rank.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, AdapterFlops
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import low_rank_term
from sira_jax.adapters.merging_chain import Leaves, MergingChainConfig, project_with_sum
from sira_jax.errors import check

SKETCHES = ("left", "right")
SKETCH_INITS = ("gaussian", "kaiming_uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RACLoRAConfig(MergingChainConfig):
    """Fields of RAC-LoRA: those of MergingChainConfig, and

    Attributes:
      sketch: which factor is drawn at the start of a stage and frozen, the other being trained from zero [S]: "right", A
        (D, R) and B is trained; "left", B (R, F) and A is trained [C: "right", LoRA's own start].
      sketch_init: distribution of the drawn factor's entries, d being the factor's long side (D of A, F of B) [C]:
        "gaussian", N(0, 1 / d), so that the R drawn directions have length 1 on average; "kaiming_uniform",
        U(-1 / sqrt(d), 1 / sqrt(d)), which is LoRA's A.
    """

    method: ClassVar[str] = "rac_lora"
    training_fields: ClassVar[frozenset[str]] = MergingChainConfig.training_fields | {"sketch_init"}

    sketch: str = "right"
    sketch_init: str = "gaussian"

    def __post_init__(self):
        for field, allowed in (("sketch", SKETCHES), ("sketch_init", SKETCH_INITS)):
            value = getattr(self, field)
            check(value in allowed, f"adapter.{field}", value, f"one of {', '.join(allowed)}")
        super().__post_init__()

    @property
    def factors(self) -> tuple[str, str]:
        """Names of the leaves that hold A and B."""
        if self.sketch == "right":
            return "buffer_lora_a", "lora_b"
        return "lora_a", "buffer_lora_b"

    def make_module(self) -> nn.Module:
        return RACLoRA(config=self, name=ADAPTER)

    def delta(self, leaves: Leaves) -> jax.Array:
        name_a, name_b = self.factors
        return self.scale * (leaves[name_a] @ leaves[name_b])

    def draw_sketch(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
        """The random factor in its shape, (D, R) or (R, F)."""
        long_side = shape[0] if self.sketch == "right" else shape[1]
        bound = long_side**-0.5
        if self.sketch_init == "gaussian":
            return bound * jax.random.normal(key, shape, dtype)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def fresh_stage(self, leaves: Leaves, key: jax.Array, active: jax.Array) -> dict[str, Any]:
        del active
        drawn, trained = self.factors if self.sketch == "right" else reversed(self.factors)
        return {
            drawn: self.draw_sketch(key, leaves[drawn].shape),
            trained: jnp.zeros_like(leaves[trained]),
        }

    def count_parameters(self, d_in: int, d_out: int) -> int:
        """Of the trained factor; neither the drawn one nor `buffer_merged` counts."""
        return self.rank * (d_out if self.sketch == "right" else d_in)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The low-rank products; taking the sum W0 + M costs d_in * d_out additions a pass, whatever the tokens."""
        return AdapterFlops(total=2 * self.rank * (d_in + d_out))


class RACLoRA(nn.Module):
    """A (D, R) and B (R, F), float32: one a random `buffer_lora_a` or `buffer_lora_b`, the other trained from zero.

    Buffer besides, float32: buffer_merged (D, F), zero.
    """

    config: RACLoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The merged projection's output (B, T, F) plus the stage's low-rank term."""
        config = self.config
        (d_in, d_out), (in_axis, out_axis) = projection.shape, projection.adapter_axes
        y_BTF = project_with_sum(self, x_BTD, projection)
        name_a, name_b = config.factors
        init_a, init_b = config.draw_sketch, nn.initializers.zeros
        if config.sketch == "left":
            init_a, init_b = init_b, init_a
        lora_a_DR = self.param(
            name_a,
            nn.with_logical_partitioning(init_a, (in_axis, "rank")),
            (d_in, config.rank),
        )
        lora_b_RF = self.param(
            name_b,
            nn.with_logical_partitioning(init_b, ("rank", out_axis)),
            (config.rank, d_out),
        )
        delta_BTF = low_rank_term(
            x_BTD, lora_a_DR, lora_b_RF, config.scale, config.dropout_rate, context
        )
        return y_BTF + delta_BTF.astype(y_BTF.dtype)
