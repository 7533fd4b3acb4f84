"""The trained tree and the frozen tree, and the state that a step updates."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from sira_jax.adapters import is_adapter, split_trained
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder

Params = dict[str, Any]


@struct.dataclass
class TrainState:
    """What training changes: nothing of the frozen base is in it.

    Attributes:
      step: optimizer steps done, an int32 scalar.
      adapter: the adapter's parameters: trained ones and buffers (see `adapters.base.BUFFER`).
      optimizer: optax state of the trained ones.
    """

    step: jax.Array
    adapter: Params
    optimizer: optax.OptState


def split_params(params: Mapping[str, Any]) -> tuple[Params, Params]:
    """Splits parameters into (adapter, frozen) by `adapters.is_adapter`."""
    flat = traverse_util.flatten_dict(params)
    adapter = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
    frozen = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    return traverse_util.unflatten_dict(adapter), traverse_util.unflatten_dict(frozen)


def merge_params(*trees: Mapping[str, Any]) -> Params:
    """One tree from trees with different leaves; the inverse of `split_params` and `adapters.split_trained`."""
    flat: dict[tuple[str, ...], Any] = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat)


def abstract_params(model: Decoder) -> Params:
    """Shapes, types and logical axis names (flax partitioning boxes) of all parameters, without computing any."""
    tokens = {"decoder_input_tokens": jnp.zeros((1, 2), jnp.int32)}
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def init_adapter(model: Decoder, seed: int) -> Params:
    """Fresh parameters of the adapter, float32. The frozen ones are not computed: the compiler drops what is not returned.

    Raises:
      ConfigError: if the adapter's targets match no projection of the model.
    """

    @jax.jit
    def init(key):
        tokens = {"decoder_input_tokens": jnp.zeros((1, 2), jnp.int32)}
        adapter = split_params(nn.unbox(model.init(key, tokens)["params"]))[0]
        if model.adapter is not None:
            adapter = model.adapter.initialise(adapter, jax.random.fold_in(key, 1))
        return adapter

    adapter = init(jax.random.key(seed))
    if model.adapter is not None and not adapter:
        raise ConfigError(
            f"adapter.targets={model.adapter.targets!r} is not allowed: it matches no projection of the model"
        )
    return adapter


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_trained(adapter: Params) -> int:
    """Number of trained parameters in an adapter's tree: its buffers do not count."""
    return count(split_trained(adapter)[0])
