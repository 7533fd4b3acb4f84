"""Chains of low-rank stages: each stage's product is merged into a kept sum, and the next starts. XGBLoRA and RAC-LoRA.

y = (W0 + M) x + the stage's low-rank term. The base W0 is never written: M, the sum of the merged products, is the float32
leaf `buffer_merged`, saved with the adapter.

A stage's random draws depend on the step's key, the projection's path and the layer's index alone: stacked and separate layers
go through the same chain.

Axis letters: B batch, T length, D features in, F features out, L layers.
"""

import abc
import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import (
    AdapterConfig,
    Path,
    StepInfo,
    projection_name,
    split_layer,
)
from sira_jax.adapters.checks import check_count
from sira_jax.adapters.context import Projection
from sira_jax.adapters.low_rank import add_to_kernel
from sira_jax.adapters.trees import (
    by_layer,
    by_projection,
    from_projections,
    is_stacked,
    map_stacked,
)
from sira_jax.errors import check

MERGED = "buffer_merged"

Leaves = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergingChainConfig(AdapterConfig):
    """Fields of every merging chain: those of AdapterConfig, and

    Attributes:
      merge_every: optimizer steps of a stage: after each of the steps merge_every, 2 merge_every, ... its product is merged
        and the next stage starts [C: 100]. An end of training within a stage merges nothing: the model is the same function
        before a merge and after it, and `merge` counts the unmerged product in.
      restart_optimizer: the optimizer's moments start anew with each stage; the learning-rate schedule goes on [C: True, as
        the old ones belong to parameters that are gone].
    """

    training_fields: ClassVar[frozenset[str]] = AdapterConfig.training_fields | {
        "merge_every",
        "restart_optimizer",
    }
    whole_model_fields: ClassVar[frozenset[str]] = frozenset({"merge_every", "restart_optimizer"})

    merge_every: int = 100
    restart_optimizer: bool = True

    def __post_init__(self):
        check_count("merge_every", self.merge_every)
        check(
            isinstance(self.restart_optimizer, bool),
            "adapter.restart_optimizer",
            self.restart_optimizer,
            "True or False",
        )
        super().__post_init__()

    @abc.abstractmethod
    def delta(self, leaves: Leaves) -> jax.Array:
        """The running stage's product s A B, float32 (..., D, F); leading axes, of layers, go along."""

    @abc.abstractmethod
    def fresh_stage(self, leaves: Leaves, key: jax.Array, active: jax.Array) -> dict[str, Any]:
        """All leaves of one layer's projection but the sum, as a new stage starts; their product must be 0.

        Args:
          leaves: the last stage's, for their shapes.
          key: random key of this layer, projection and stage.
          active: float32 scalar, 1 where the stage trains this layer and 0 elsewhere.
        """

    def choose_layers(self, key: jax.Array, num_layers: int) -> jax.Array:
        """Which layers a new stage trains, float32 (L,) of ones and zeros; all, unless a method says otherwise."""
        del key
        return jnp.ones(num_layers, jnp.float32)

    def next_stage(self, adapter: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """Merges the whole model's running stage and starts the next one.

        Args:
          adapter: adapter tree of the whole model, layers stacked or apart.
          key: random key of the new stage.
        """
        projections = by_projection(adapter)
        layers = _layers_of(projections)
        choice_key, draw_key = jax.random.split(key)
        active = self._active_layers(projections, choice_key)
        started = {}
        for path, leaves in projections.items():
            name = projection_name(path)
            config = self.for_projection(name)
            own_key = jax.random.fold_in(draw_key, zlib.crc32(name.encode()))
            active_L = active[split_layer(path)[0]]

            def fresh(leaves, layer, config=config, own_key=own_key, active_L=active_L):
                key = jax.random.fold_in(own_key, layer)
                return config.fresh_stage(leaves, key, active_L[layer])

            started[path] = {
                MERGED: _add_product(config, path, leaves),
                **map_stacked(path, fresh, leaves, layers[path]),
            }
        return from_projections(started)

    def _active_layers(
        self, projections: Mapping[Path, Leaves], key: jax.Array
    ) -> dict[Path, jax.Array]:
        """Prefix of each stack of layers -> `choose_layers` of it; an encoder's and a decoder's are drawn apart."""
        counts: dict[Path, int] = {}
        for places in by_layer(projections).values():
            prefix = split_layer(places[0][0])[0]
            counts[prefix] = max(counts.get(prefix, 0), len(places))
        return {
            prefix: self.choose_layers(
                jax.random.fold_in(key, zlib.crc32("/".join(prefix).encode())) if prefix else key,
                count,
            )
            for prefix, count in counts.items()
        }

    def initialise(self, adapter: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """The first stage; the product that it merges of fresh parameters is 0."""
        return self.next_stage(adapter, key) if adapter else adapter

    def after_step(
        self, adapter: dict[str, Any], info: StepInfo
    ) -> tuple[dict[str, Any], jax.Array | None]:
        """The next stage after every `merge_every` steps; between them nothing changes."""
        is_due = info.step % self.merge_every == 0
        adapter = jax.lax.cond(
            is_due, lambda tree: self.next_stage(tree, info.key), lambda tree: tree, adapter
        )
        return adapter, is_due if self.restart_optimizer else None

    def merge(self, params: Leaves, kernel_DF: jax.Array) -> jax.Array:
        """W0 + M + the unmerged product, summed in float32 and cast back to the kernel's type; leading axes go along."""
        return add_to_kernel(kernel_DF, params[MERGED] + self.delta(params))


def _add_product(config: MergingChainConfig, path: Path, leaves: Leaves) -> jax.Array:
    """M + s A B of one projection, (D, F) or stacked."""
    merged = leaves[MERGED]
    if not is_stacked(path):
        return merged + config.delta(leaves)
    factors = {name: leaf for name, leaf in leaves.items() if name != MERGED}

    # In place and layer by layer: the products of all layers at once would be a copy of the base.
    def add(layer, merged_LDF):
        own = jax.tree.map(lambda leaf: leaf[layer], factors)
        return merged_LDF.at[layer].add(config.delta(own))

    return jax.lax.fori_loop(0, merged.shape[0], add, merged)


def _layers_of(projections: Mapping[Path, Leaves]) -> dict[Path, jax.Array]:
    """Index of each module's layer, int32: (L,) where they are stacked, a scalar where they are apart."""
    found: dict[Path, list[int]] = {}
    for places in by_layer(projections).values():
        for layer, (path, _) in enumerate(places):
            found.setdefault(path, []).append(layer)
    return {
        path: jnp.asarray(layers if is_stacked(path) else layers[0], jnp.int32)
        for path, layers in found.items()
    }


def project_with_sum(module: nn.Module, x_BTD: jax.Array, projection: Projection) -> jax.Array:
    """(W0 + M) x + b, (B, T, F), in one product; declares M (D, F), zero, as `module`'s parameter.

    The sum is rounded to the type of the computation after it is taken in float32.
    """
    merged_DF = module.param(
        MERGED,
        nn.with_logical_partitioning(nn.initializers.zeros, projection.kernel_axes),
        projection.shape,
    )

    # The backward pass takes the sum again: kept, it would be a copy of the base, of all layers at once.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(x_BTD, kernel_DF, merged_DF):
        sum_DF = kernel_DF.astype(jnp.float32) + merged_DF
        return dataclasses.replace(projection, kernel_DF=sum_DF, bias_F=None, held=None)(x_BTD)

    return projection.add_bias(product(x_BTD, projection.kernel_DF, merged_DF))
