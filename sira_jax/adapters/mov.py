"""MoV: activations times l = sum over e of p_e l_e, a mixture of E vectors. arXiv 2309.05444 [O].

y = l * (W0 x + b) on k and v, y = W0 (l * x) + b on the MLP's last projection, whose input is the MLP's hidden layer.

Axis letters: B batch, T length, D features in, F features out, E experts, W the features that are scaled: D or F.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters import mixture
from sira_jax.adapters.base import ADAPTER, AdapterFlops
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.errors import check
from sira_jax.routing import project

POSITIONS = ("auto", "input", "output")
# Projections whose input "auto" scales: the last ones of a Llama's and of a T5's MLP.
INPUT_PROJECTIONS = ("down", "wo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoVConfig(mixture.MixtureConfig):
    """Fields of MoV: those of MixtureConfig, and

    There is no low-rank pair, so `rank`, `alpha` and `dropout_rate` take no values but 1, 1 and 0. Default targets are k, v and
    down [P: keys, values and the MLP's hidden layer].

    Attributes:
      position: what the vectors scale: the projection's "input" or "output", or "auto": the input of down and wo, the output
        of others.
    """

    method: ClassVar[str] = "mov"
    size_field: ClassVar[str | None] = "num_experts"

    rank: int = 1
    alpha: float = 1.0
    targets: tuple[str, ...] | str = ("k", "v", "down")
    position: str = "auto"

    def __post_init__(self):
        for field, value in (("rank", 1), ("alpha", 1), ("dropout_rate", 0)):
            given = getattr(self, field)
            check(
                given == value, f"adapter.{field}", given, f"{value}, as MoV has no low-rank pair"
            )
        check(self.position in POSITIONS, "adapter.position", self.position, f"one of {POSITIONS}")
        super().__post_init__()

    def for_projection(self, path: str) -> "MoVConfig | None":
        """The config of the adapter on the projection at `path` with "auto" resolved, or None where there is none."""
        config = super().for_projection(path)
        return config and dataclasses.replace(config, position=config.position_at(path))

    def position_at(self, path: str) -> str:
        """ "input" or "output", for the projection at `path`."""
        if self.position != "auto":
            return self.position
        return "input" if path.rsplit("/", 1)[-1] in INPUT_PROJECTIONS else "output"

    def make_module(self) -> nn.Module:
        return MoV(config=self, name=ADAPTER)

    def expert_parameters(self, d_in: int, d_out: int) -> int:
        """Features of one vector; without a path (see `for_projection`) "auto" counts as "output"."""
        return d_in if self.position == "input" else d_out

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """Router, mixture of the vectors, and one multiplication a feature."""
        flops = super().flops_per_token(d_in, d_out)
        return dataclasses.replace(flops, total=flops.total + self.expert_parameters(d_in, d_out))


class MoV(nn.Module):
    """Parameters, float32: router (D, E) normal, vectors (E, W) one.

    Sows into `losses` the weighted load-balancing loss (a scalar) and into `metrics` the router's statistics.
    """

    config: MoVConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection (B, T, F) with its output or its input scaled."""
        config = self.config
        d_in, d_out = projection.shape
        scales_input = config.position_at(projection.path) == "input"
        vectors_EW = self.param(
            "vectors",
            nn.with_logical_partitioning(
                nn.initializers.ones,
                ("expert", projection.adapter_axes[0 if scales_input else 1]),
            ),
            (config.num_experts, d_in if scales_input else d_out),
        )
        gate = mixture.route_tokens(self, x_BTD, projection, config, context)
        # Deviations from one are mixed, and not the vectors: probabilities may sum to 1 but for a rounding, and vectors of
        # ones must change nothing. Under a selection, too, an expert that is left out counts as a vector of ones.
        deviation_EW = (vectors_EW - 1.0).astype(x_BTD.dtype)
        mixed_BTW = project(gate.gates_BTE.astype(x_BTD.dtype), deviation_EW)
        # Gates of padding are 0; this keeps its activations out of the gradients as well, where inf * 0 is not 0.
        factor_BTW = 1.0 + jnp.where(gate.valid_BT[..., None], mixed_BTW, 0.0)
        if scales_input:
            return projection(_scaled(x_BTD, factor_BTW))
        return _scaled(projection(x_BTD), factor_BTW)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x * factor in x's type, multiplied in float32: a bfloat16 near 1 has but 2 or 3 digits."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
