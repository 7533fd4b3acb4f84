"""The mesh, and the one place where logical axis names meet mesh axes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sira_jax.errors import ConfigError
from sira_jax.training.config import MeshConfig

# Logical axis -> mesh axis. Adapters are small: all but their expert axis is replicated, so that their use needs no
# communication; their gradients are summed over the batch's axes.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "adapter_in": None,
    "adapter_out": None,
    "rank": None,
    "norm": None,
    "layers": None,
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of all `devices` (default: jax.devices()) with the axes data, fsdp, tensor, expert.

    Raises:
      ConfigError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if -1 in sizes.values():
        rest = len(devices) // known
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ConfigError(
            f"mesh={dataclasses.asdict(config)} is not allowed: the sizes must multiply to the {len(devices)}"
            " devices at hand"
        )
    shape = tuple(sizes.values())
    return Mesh(np.asarray(devices).reshape(shape), tuple(sizes))


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int) -> None:
    """Raises ConfigError unless every device gets equally many rows of each microbatch."""
    rows = batch_size // accumulation_steps
    shards = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
    if rows % shards:
        raise ConfigError(
            f"data.batch_size={batch_size} is not allowed: with train.accumulation_steps={accumulation_steps} a"
            f" multiple of {accumulation_steps * shards}, for {shards} devices along the batch"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the axes that carry data; all else replicated."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Shardings of a tree with logical axis names (`train_state.abstract_params`), as a plain tree of NamedSharding.

    An axis whose length the mesh axis does not divide is replicated.
    """

    def sharding(box: nn.LogicallyPartitioned) -> NamedSharding:
        entries = []
        for name, length in zip(box.names, box.value.shape, strict=True):
            mesh_axis = RULES[name] if name else None
            divides = mesh_axis is not None and length % mesh.shape[mesh_axis] == 0
            entries.append(mesh_axis if divides else None)
        return NamedSharding(mesh, PartitionSpec(*entries))

    def is_box(x):
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(sharding, abstract, is_leaf=is_box)


def optimizer_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: a leaf that mirrors a parameter has that parameter's, others are replicated.

    Args:
      state: shapes of the optimizer's state.
      params: the parameters it was made for.
      shardings: of `params`.
      mesh: devices.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def place(path, leaf):
        # optax keeps trees shaped like the parameters inside its states, so a mirror's path ends in the parameter's.
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)
