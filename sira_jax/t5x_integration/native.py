"""Between native training and T5X: one state in the form of the other, so that either goes on where the other stopped.

Both hold the same arrays: adapter, the optax state of its trained part, step. Neither knows the other's position in the data.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core as flax_core

from sira_jax.adapters import is_adapter, partition
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.checkpoints.orbax import Checkpointer
from sira_jax.errors import CheckpointError
from sira_jax.t5x_integration.engine import optimizers
from sira_jax.t5x_integration.optimizer import like
from sira_jax.training.loop import abstract
from sira_jax.training.resumable import check_base
from sira_jax.training.train_state import TrainState, merge_params

_PARTS = ("adapter", "optimizer", "meta")


def to_native(state: Any) -> TrainState:
    """Native training's state from T5X's; the frozen base stays behind."""
    adapter, _ = partition(flax_core.unfreeze(state.params), is_adapter)
    return TrainState(
        step=jnp.asarray(state.step, jnp.int32), adapter=adapter, optimizer=state.param_states
    )


def from_native(native: TrainState, state: Any) -> Any:
    """`state`, of T5X, with the adapter, optimizer state and step of native training, on the devices where its own were.

    Raises:
      CheckpointError: the trees do not fit, so that the adapter or the optimizer is another.
    """
    adapter, base = partition(flax_core.unfreeze(state.params), is_adapter)
    adapter = _placed("adapter", native.adapter, adapter)
    if not hasattr(state, "_optimizer"):
        # For evaluation T5X keeps no optimizer.
        return state.replace(
            params=like(state.params, merge_params(adapter, base)), step=jnp.asarray(native.step)
        )
    moments = _placed("optimizer", native.optimizer, state.param_states)
    optimizer = state._optimizer
    step = _placed("step", native.step, optimizer.state.step)
    return state.replace(
        _optimizer=optimizer.replace(
            target=like(state.params, merge_params(adapter, base)),
            state=optimizers.OptimizerState(step=step, param_states=moments),
        )
    )


def _placed(name: str, new: Any, old: Any) -> Any:
    shapes = [jax.tree.map(lambda x: np.shape(x), tree) for tree in (new, old)]
    if jax.tree.structure(new) != jax.tree.structure(old) or shapes[0] != shapes[1]:
        raise CheckpointError(
            f"the native checkpoint's {name} does not fit: the model's adapter or its optimizer is another"
        )
    return jax.tree.map(lambda x, place: jax.device_put(np.asarray(x), place.sharding), new, old)


def is_native(path: str) -> bool:
    """Whether this is a checkpoint of native training: RUN/checkpoints/STEP."""
    return all(os.path.isdir(os.path.join(path, part)) for part in _PARTS)


def restore_native(path: str, state: Any) -> Any:
    """`state`, of T5X with the base in it, with what a checkpoint of native training holds.

    Raises:
      CheckpointError: the checkpoint is damaged, is of another adapter or optimizer, or was trained on another base.
    """
    directory, name = os.path.split(os.path.abspath(path))
    step = int(name)
    adapter, base = partition(flax_core.unfreeze(state.params), is_adapter)
    checkpointer = Checkpointer(directory)
    try:
        checkpointer.check(step)
        check_base(checkpointer.restore_meta(step), fingerprint(base), path)
        if hasattr(state, "_optimizer"):
            own = to_native(state)
            rest = {"step": own.step, "optimizer": own.optimizer}
            adapter, rest, _ = checkpointer.restore(step, abstract(adapter), abstract(rest))
            native = TrainState(adapter=adapter, **rest)
        else:
            adapter = checkpointer.restore_adapter(step, abstract(adapter))
            native = TrainState(step=jnp.int32(step), adapter=adapter, optimizer=())
    finally:
        checkpointer.close()
    return from_native(native, state)
