"""The trained tree and the frozen tree, and the state that a step updates."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from sira_jax.adapters import is_adapter, partition, split_trained
from sira_jax.models import Model
from sira_jax.models.adapter_init import fresh_adapter
from sira_jax.training import partitioning
from sira_jax.training.axis_rules import Rules

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


def fresh_state(adapter: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of an adapter's tree."""
    moments = optimizer.init(split_trained(adapter)[0])
    return TrainState(step=jnp.int32(0), adapter=adapter, optimizer=moments)


def split_params(params: Mapping[str, Any]) -> tuple[Params, Params]:
    """Splits parameters into (adapter, frozen) by `adapters.is_adapter`."""
    return partition(params, is_adapter)


def merge_params(*trees: Mapping[str, Any]) -> Params:
    """One tree from trees with different leaves; the inverse of `split_params` and `adapters.split_trained`."""
    flat: dict[tuple[str, ...], Any] = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat)


def abstract_params(model: Model) -> Params:
    """Shapes, types and logical axis names (flax partitioning boxes) of all parameters, without computing any."""
    return jax.eval_shape(model.init, jax.random.key(0), model.init_batch())["params"]


def abstract_adapter(
    model: Model, mesh: jax.sharding.Mesh, rules: Rules = partitioning.RULES
) -> Params:
    """Shapes, types and shardings of `init_adapter`'s tree on a mesh, without computing it."""
    abstract = split_params(abstract_params(model))[0]
    shardings = partitioning.param_shardings(abstract, mesh, rules)
    shapes = jax.eval_shape(lambda key: fresh_adapter(model, key), jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def init_adapter(model: Model, seed: int, shardings: Any = None) -> Params:
    """Fresh parameters of the adapter, float32; see `models.fresh_adapter`.

    Args:
      model: with the adapter.
      seed: of the draws, whose result does not depend on the shardings.
      shardings: where each leaf goes; None is the default device.

    Raises:
      ConfigError: if the adapter's targets match no projection of the model.
    """
    init = jax.jit(fresh_adapter, static_argnums=0, out_shardings=shardings)
    return init(model, jax.random.key(seed))


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_trained(adapter: Params) -> int:
    """Number of trained parameters in an adapter's tree: its buffers do not count."""
    return count(split_trained(adapter)[0])
