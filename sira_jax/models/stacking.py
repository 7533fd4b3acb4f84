"""What stacks of equal blocks have in common: their layout, what goes from layer to layer, the slots of a cache.

Axis letters: B batch, T length of this call, S slots of the cache.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters import AdapterConfig
from sira_jax.routing import KEPT

_REMAT_POLICIES = {
    "full": None,
    "projections": jax.checkpoint_policies.save_only_these_names(KEPT),
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def make_blocks(
    block: type[nn.Module],
    num_layers: int,
    config: Any,
    adapter: AdapterConfig | None,
    in_axes: Any = nn.broadcast,
) -> Any:
    """The attribute `layers` of a stack, for its `setup`: one scanned module, or a list where `scan_layers` is off.

    Args:
      block: called as block(config, adapter)(state, *others) -> (state, None).
      num_layers: blocks.
      config: of the model, with `scan_layers` and `remat_policy`.
      adapter: handed to each block.
      in_axes: of `others` where layers are scanned: by default each is the same for all layers.
    """
    if config.remat_policy != "none":
        block = nn.remat(
            block,
            prevent_cse=not config.scan_layers,
            policy=_REMAT_POLICIES[config.remat_policy],
        )
    if not config.scan_layers:
        return [block(config, adapter) for _ in range(num_layers)]
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "cache": 0, "losses": 0, "metrics": 0},
        split_rngs={
            "params": True,
            "dropout": True,
            "expert_dropout": True,
            "expert_choice": True,
        },
        in_axes=in_axes,
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, adapter)


def run_blocks(layers: Any, state: Any, *shared: Any) -> Any:
    """The state after all blocks of `make_blocks`."""
    for block in layers if isinstance(layers, Iterable) else [layers]:
        state, _ = block(state, *shared)
    return state


def initial_carry(
    adapter: AdapterConfig | None,
    projections: Mapping[str, tuple[int, int]],
    batch_shapes: Mapping[str, tuple[int, int]],
    dtype: str,
) -> dict[str, Any]:
    """What the adapters of the first layer find of a layer before, by projection; empty for most methods.

    Args:
      adapter: of the model, or None.
      projections: path -> (d_in, d_out).
      batch_shapes: path -> (B, T) of what the projection reads; projections that are not here do not run.
      dtype: type of the computation.
    """
    carry = {}
    for path, shape in batch_shapes.items():
        own = adapter and adapter.for_projection(path)
        if own:
            first = own.initial_carry(*projections[path], shape, jnp.dtype(dtype))
            carry |= {} if first is None else {path: first}
    return carry


def advance_cache(
    module: nn.Module, segments_BT: jax.Array, cache_length: int
) -> tuple[jax.Array, jax.Array]:
    """Takes the next T slots of the cache, whose state is in the `cache` collection of `module`.

    Returns the slot where this call's tokens go and the segment ids of all slots (B, S), these tokens' included.
    """
    if module.has_variable("cache", "index"):
        start = module.get_variable("cache", "index")
        slots_BS = module.get_variable("cache", "segment_ids")
    else:
        start = jnp.zeros((), jnp.int32)
        slots_BS = jnp.zeros((segments_BT.shape[0], cache_length), jnp.int32)
    slots_BS = jax.lax.dynamic_update_slice_in_dim(
        slots_BS, segments_BT.astype(jnp.int32), start, axis=1
    )
    module.put_variable("cache", "segment_ids", slots_BS)
    module.put_variable("cache", "index", start + segments_BT.shape[1])
    return start, slots_BS
