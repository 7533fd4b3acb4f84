"""Logical axis names of this package's parameters for T5X's partitioner, and its rules for them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from sira_jax.errors import check
from sira_jax.t5x_integration.engine import partitioning

# Mesh axes that T5X's partitioner has.
MESH_AXES = ("data", "model", None)


def parameter_axes(boxed: Mapping[str, Any]) -> dict[str, Any]:
    """The `params_axes` collection of parameters in flax's partitioning boxes: leaf "kernel" -> "kernel_axes"."""
    axes = {}
    for path, leaf in traverse_util.flatten_dict(boxed).items():
        ndim = len(nn.unbox(leaf).shape)
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * ndim
        axes[*path[:-1], f"{path[-1]}_axes"] = flax_partitioning.AxisMetadata(names=tuple(names))
    return traverse_util.unflatten_dict(axes)


def logical_axis_rules(
    expert: str | None = None,
    rank: str | None = None,
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
) -> list[tuple[str, str | None]]:
    """T5X's standard rules and those of the axes that adapters add.

    Adapters are small: by default each device holds them whole, so that their use needs no communication.

    Args:
      expert: mesh axis of the experts: "model" or "data", which must divide their number, or None.
      rank: mesh axis of the low-rank pairs' inner axis, likewise.
      activation_partitioning_dims, parameter_partitioning_dims: of `t5x.partitioning.standard_logical_axis_rules`.

    Raises:
      ConfigError: another mesh axis.
    """
    for name, value in (("expert", expert), ("rank", rank)):
        check(value in MESH_AXES, f"logical_axis_rules.{name}", value, "'data', 'model' or None")
    own = [
        ("kv_heads", "model"),
        ("expert", expert),
        ("rank", rank),
        *((f"adapter_{name}", None) for name in ("embed", "heads", "kv_heads", "mlp")),
        ("norm", None),
    ]
    return partitioning.standard_logical_axis_rules(
        activation_partitioning_dims=activation_partitioning_dims,
        parameter_partitioning_dims=parameter_partitioning_dims,
        additional_rules=own,
    )
