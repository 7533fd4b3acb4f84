"""The adapter tree of a whole model: taking it apart by projection and by layer, merging, counting.

A projection is named by its module's path: ("layers", "attention", "q") where the layers are stacked on axis 0,
("layers_3", "attention", "q") where they are apart, ("encoder", "layers", "attention", "query") in a stack of several.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
from flax import traverse_util

from sira_jax.adapters.base import (
    ADAPTER,
    AdapterConfig,
    Path,
    is_adapter,
    is_trained,
    projection_name,
    split_layer,
)
from sira_jax.quantized import dequantize


class LayerStack(Protocol):
    """What is counted of a model's stack of equal blocks; `models.Stack` is one."""

    num_layers: int
    projections: Mapping[str, tuple[int, int]]


def partition(
    tree: Mapping[str, Any], belongs: Callable[[Path], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two trees: the leaves whose path `belongs`, and the others."""
    flat = traverse_util.flatten_dict(tree)
    first = {path: leaf for path, leaf in flat.items() if belongs(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in first}
    return traverse_util.unflatten_dict(first), traverse_util.unflatten_dict(rest)


def split_trained(adapter: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an adapter tree into (trained parameters, buffers)."""
    return partition(adapter, is_trained)


def by_projection(adapter: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """Module path of each adapter -> its leaves; a block module's path is that of its block."""
    found: dict[Path, dict] = {}
    for path, leaf in traverse_util.flatten_dict(adapter).items():
        at = path.index(ADAPTER)
        found.setdefault(path[:at], {})[path[at + 1 :]] = leaf
    return {path: traverse_util.unflatten_dict(leaves) for path, leaves in found.items()}


def from_projections(adapters: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `by_projection`."""
    flat = {
        (*path, ADAPTER, *inner): leaf
        for path, leaves in adapters.items()
        for inner, leaf in traverse_util.flatten_dict(leaves).items()
    }
    return traverse_util.unflatten_dict(flat)


def by_layer(leaves: Mapping[Path, Any]) -> dict[str, list[tuple[Path, int | None]]]:
    """Projection name -> its (module path, index on the stacked axis or None), first layer first.

    Args:
      leaves: module path -> tree of arrays; of a stacked path, each has the layers first.
    """
    layers: dict[str, dict[int, tuple[Path, int | None]]] = {}
    for path, tree in leaves.items():
        places = layers.setdefault(projection_name(path), {})
        layer = split_layer(path)[1]
        if layer is None:
            count = jax.tree.leaves(tree)[0].shape[0]
            places |= {layer: (path, layer) for layer in range(count)}
        else:
            places[layer] = (path, None)
    return {name: [places[layer] for layer in sorted(places)] for name, places in layers.items()}


def is_stacked(path: Path) -> bool:
    """Whether the leaves of the module at `path` have a first axis of layers."""
    return split_layer(path)[1] is None


def map_stacked(path: Path, function: Callable, *trees: Any) -> Any:
    """`function(*trees)` of one layer; mapped over the first axis where the path's layers are stacked."""
    return jax.vmap(function)(*trees) if is_stacked(path) else function(*trees)


def merge(adapter: AdapterConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the plain model that computes what the adapted one computes.

    Args:
      adapter: config of the model's adapters.
      params: all parameters, layers stacked or apart.

    Raises:
      MergeError: the method has no such model, with the reason.
    """
    return replace_kernels(params, adapter.merge_tree)


def replace_kernels(
    params: Mapping[str, Any],
    merge_tree: Callable[[Mapping[Path, Any], Mapping[Path, jax.Array]], dict[Path, jax.Array]],
) -> dict[str, Any]:
    """All parameters without the adapters', and with the kernels that `merge_tree(adapters, kernels)` returns.

    Matrices held in few bits are made whole: their sum with an adapter would not fit in these.
    """
    flat = {path: dequantize(x) for path, x in traverse_util.flatten_dict(params).items()}
    own = {path: flat.pop(path) for path in list(flat) if is_adapter(path)}
    adapters = by_projection(traverse_util.unflatten_dict(own))
    kernels = {path: flat[*path, "kernel"] for path in adapters if (*path, "kernel") in flat}
    merged = merge_tree(adapters, kernels)
    flat |= {(*path, "kernel"): kernel for path, kernel in merged.items()}
    return traverse_util.unflatten_dict(flat)


def count_model_parameters(
    adapter: AdapterConfig,
    stacks: Iterable[LayerStack],
    emb_dim: int,
    *,
    active: bool = False,
) -> int:
    """Trained parameters of a whole model, without making it.

    Args:
      adapter: config.
      stacks: the model config's `stacks`.
      emb_dim: width of the residual stream.
      active: count only what a token uses (see `AdapterConfig.active_parameters` and `active_layers`).
    """
    total = 0
    for stack in stacks:
        block = adapter.count_block_parameters(emb_dim)
        for path, (d_in, d_out) in stack.projections.items():
            config = adapter.for_projection(path)
            if config:
                count = config.active_parameters if active else config.count_parameters
                block += count(d_in, d_out)
        layers = adapter.active_layers(stack.num_layers) if active else stack.num_layers
        total += layers * block
    return total
