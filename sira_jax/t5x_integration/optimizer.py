"""The optimizer of the adapter alone, in T5X's form: the frozen base has no state and is handed through untouched."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import core as flax_core

from sira_jax.adapters import is_trained, partition
from sira_jax.errors import check, is_whole_number
from sira_jax.t5x_integration.engine import optimizers
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import merge_params

DEFAULT = OptimizerConfig()


class AdapterOptimizer(optimizers.OptaxWrapper):
    """An optax optimizer of the parameters that `adapters.is_trained` names.

    T5X's MultiOptimizer cannot hold an optax optimizer's state in a checkpoint, and its optax wrapper alone makes state
    for every parameter.

    Attributes:
      schedule: learning rate by step, for the logs; the updates follow the optimizer's own.
    """

    def __init__(self, optimizer: optax.GradientTransformation, schedule: optax.Schedule):
        super().__init__(optimizer)
        self.schedule = schedule

    def init_state(self, params: Any) -> Any:
        """The state of the trained parameters among `params`."""
        return super().init_state(trained_part(params))

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: Any, grads: Any
    ) -> tuple[Any, Any]:
        """(new parameters, new state); `grads` is of the trained ones, or of all, whose others are ignored."""
        trained, rest = partition(params, is_trained)
        trained, state = super().apply_gradient(hyper_params, trained, state, trained_part(grads))
        return like(params, merge_params(trained, rest)), state

    def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
        """T5X's optimizer object with logical axes for arrays: what mirrors a parameter has its axes, the rest none."""
        axes = trained_part(param_logical_axes)
        params = trained_part(optimizer.target)
        known = {
            path: (leaf.shape, names)
            for (path, leaf), names in zip(
                jax.tree_util.tree_leaves_with_path(params),
                jax.tree.leaves(axes, is_leaf=_is_axes),
                strict=True,
            )
        }

        def place(path, leaf):
            # optax keeps trees shaped like the parameters inside its states, so a mirror's path ends in the parameter's.
            for start in range(len(path)):
                shape, names = known.get(path[start:], (None, None))
                if shape == leaf.shape:
                    return names
            return None

        state = jax.tree_util.tree_map_with_path(place, optimizer.state.param_states)
        return optimizers.Optimizer(
            self, optimizers.OptimizerState(step=None, param_states=state), param_logical_axes
        )


def _is_axes(x: Any) -> bool:
    return isinstance(x, jax.sharding.PartitionSpec)


def trained_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The trained leaves of a tree of parameters, gradients or axes, as a plain dictionary."""
    return partition(flax_core.unfreeze(tree), is_trained)[0]


def like(old: Any, new: dict[str, Any]) -> Any:
    """`new`, frozen if `old` is: T5X compiles for the very type of tree it began with."""
    return flax_core.freeze(new) if isinstance(old, flax_core.FrozenDict) else new


def adapter_optimizer(num_steps: int, config: OptimizerConfig = DEFAULT) -> AdapterOptimizer:
    """The optimizer of native training for T5X: clipping, AdamW or Adafactor, schedule and weight decay by its config.

    Args:
      num_steps: steps of the whole training, which the schedule's decay ends with.
      config: its fields.

    Raises:
      ConfigError: a bad number of steps, or a warm-up that is longer.
    """
    is_count = is_whole_number(num_steps) and num_steps >= 1
    check(is_count, "adapter_optimizer.num_steps", num_steps, "a whole number of at least 1")
    check(
        config.warmup_steps <= num_steps,
        "optimizer.warmup_steps",
        config.warmup_steps,
        f"at most num_steps={num_steps}",
    )
    return AdapterOptimizer(make_optimizer(config, num_steps), make_schedule(config, num_steps))
