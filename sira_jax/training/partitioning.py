"""The mesh, and the one place where logical axis names meet mesh axes (by the table in `axis_rules`)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sira_jax import placement
from sira_jax.adapters import AdapterConfig
from sira_jax.errors import ConfigError
from sira_jax.training.axis_rules import RULES, Rules, with_changes
from sira_jax.training.config import MeshConfig


def make_rules(config: MeshConfig) -> Rules:
    """The table of a config: logical axis -> mesh axes."""
    return with_changes(config.rules)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of all `devices` (default: jax.devices()) with the axes data, fsdp, tensor, expert.

    On TPUs, neighbours along an axis are neighbours in the torus where the sizes allow it.

    Raises:
      ConfigError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        rest = len(devices) // known
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh={config.sizes} is not allowed: the sizes must multiply to the {len(devices)}"
            " devices at hand"
        )
    shape = tuple(sizes.values())
    arranged = np.asarray(devices).reshape(shape)
    if getattr(devices[0], "platform", "") == "tpu":
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, tuple(sizes))


def batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
    """Parts that the batch's rows are cut into."""
    return math.prod(mesh.shape[axis] for axis in rules["batch"])


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int, rules: Rules = RULES) -> None:
    """Raises ConfigError unless every device gets equally many rows of each microbatch."""
    rows = batch_size // accumulation_steps
    shards = batch_shards(mesh, rules)
    if rows % shards:
        raise ConfigError(
            f"data.batch_size={batch_size} is not allowed: with train.accumulation_steps={accumulation_steps} a"
            f" multiple of {accumulation_steps * shards}, for {shards} devices along the batch"
        )


def check_groups(
    mesh: Mesh,
    rules: Rules,
    adapter: AdapterConfig,
    projections: Iterable[str],
    rows: int,
    lengths: Iterable[int],
) -> None:
    """Raises ConfigError if an adapter's routing groups would lie on several devices.

    Args:
      mesh: devices.
      rules: the table.
      adapter: of the model.
      projections: paths of those that may carry it.
      rows: of a microbatch, over all devices.
      lengths: tokens a row, of each stream that the model reads.
    """
    shards = batch_shards(mesh, rules)
    if shards == 1:
        return
    for path in projections:
        own = adapter.for_projection(path)
        for length in lengths:
            if own is not None:
                own.check_shard(rows // shards, length)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Rows over the axes that carry data; all else replicated."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Which rows of a global batch lie where.

    Attributes:
      mesh: devices.
      size: B, rows of the global batch.
      rules: the table.
    """

    mesh: Mesh
    size: int
    rules: Rules

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """The rows on this process's devices, ascending: those that it has to make. Several processes may share rows."""
        index_map = self.sharding.addressable_devices_indices_map((self.size,))
        held = {row for (cut,) in index_map.values() for row in range(*cut.indices(self.size))}
        return tuple(sorted(held))

    @property
    def sharding(self) -> NamedSharding:
        """Of each array of the batch."""
        return batch_sharding(self.mesh, self.rules)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from this process's rows, `rows`, of a batch."""

        def part(local, index):
            first, last, _ = index[0].indices(self.size)
            start = self.rows.index(first)
            return local[start : start + last - first]

        return {
            name: jax.make_array_from_callback(
                (self.size, *x.shape[1:]), self.sharding, functools.partial(part, x)
            )
            for name, x in batch.items()
        }


def axes_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> PartitionSpec:
    """How an array is cut whose axes have these logical names.

    A mesh axis cuts one axis of an array, the first that the table gives it to. An axis is cut along as many of its mesh
    axes, from the first on, as divide its length.
    """
    taken: set[str] = set()
    entries: list[Any] = []
    for name, length in zip(names, shape, strict=True):
        if name == placement.FREE:
            entries.append(PartitionSpec.UNCONSTRAINED)
            continue
        axes = [axis for axis in (rules[name] if name else ()) if axis not in taken]
        while axes and length % math.prod(mesh.shape[axis] for axis in axes):
            axes.pop()
        taken |= set(axes)
        entries.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def param_shardings(abstract: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings of a tree with logical axis names (`train_state.abstract_params`), as a plain tree of NamedSharding.

    An axis whose length the mesh axis does not divide is replicated.
    """

    def sharding(box: nn.LogicallyPartitioned) -> NamedSharding:
        return NamedSharding(mesh, axes_spec(box.names, box.value.shape, mesh, rules))

    def is_box(x):
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(sharding, abstract, is_leaf=is_box)


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """What the names of activations' axes mean on a mesh; see `sira_jax.placement`."""

    mesh: Mesh
    rules: Rules

    def constrain(self, x: jax.Array, names: placement.Names) -> jax.Array:
        spec = axes_spec(names, x.shape, self.mesh, self.rules)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def per_shard(
        self, function: Callable[..., jax.Array], whole: Any, cut: Any, size: int
    ) -> jax.Array:
        axes = axes_spec(("batch",), (size,), self.mesh, self.rules)
        if axes == PartitionSpec(None):
            return function(whole, cut)
        # What lies along tensor is left to the compiler.
        names = set(jax.tree.leaves(tuple(axes)))
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), axes),
            out_specs=axes,
            axis_names=names,
        )(whole, cut)


def placed(function: Callable, mesh: Mesh, rules: Rules = RULES) -> Callable:
    """`function`, to be jitted, with the activations of the models in it laid out on the mesh by the table."""
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with placement.active(MeshPlacement(mesh, rules)):
            return function(*args, **kwargs)

    return wrapper


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
