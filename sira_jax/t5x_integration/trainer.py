"""T5X's trainer with the step of native training: gradients of the adapter alone, random keys by step, and what a method does
at a step's end.

Axis letters: A microbatches of a step, B batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import core as flax_core

from sira_jax.adapters import StepInfo, is_adapter, is_trained, partition, split_trained
from sira_jax.checkpoints.adapter_file import check_base, read_header
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.errors import check
from sira_jax.t5x_integration.engine import metrics as metrics_lib
from sira_jax.t5x_integration.engine import optimizers, trainer
from sira_jax.t5x_integration.optimizer import AdapterOptimizer, like
from sira_jax.training.optimizers import restart_moments
from sira_jax.training.train_state import merge_params
from sira_jax.training.train_step import step_end_key

Metrics = dict[str, Any]


class AdapterTrainer(trainer.Trainer):
    """T5X's Trainer for the models of `t5x_integration.models`, whose adapter alone it trains.

    The learning rate in the logs is the optimizer's own schedule. With microbatches, each counts by its target tokens, as in
    native training.

    Args:
      model, train_state, partitioner, eval_names, summary_dir, train_state_axes, rng: T5X's. `rng` is not used: random keys
        follow the model's `seed` and the step.
      num_microbatches: microbatches a step, a divisor of the batch size; None for one.
      weight_metrics_computer: T5X's.
      learning_rate_fn: not used, see above; T5X's evaluation gives it.

    Raises:
      ConfigError: the model's optimizer is not an AdapterOptimizer.
      CheckpointError: the model starts from an adapter that was trained on another base.
    """

    def __init__(
        self,
        model: Any,
        train_state: Any,
        partitioner: Any,
        eval_names: Any,
        summary_dir: str | None,
        train_state_axes: Any,
        rng: Any,
        num_microbatches: int | None = None,
        weight_metrics_computer: Any = None,
        learning_rate_fn: Any = None,
    ):
        del learning_rate_fn
        optimizer = model.optimizer_def
        name = f"{type(model).__name__}.optimizer_def"
        allowed = (
            "a sira_jax.t5x_integration.optimizer.AdapterOptimizer, which leaves the base alone"
        )
        check(isinstance(optimizer, AdapterOptimizer), name, optimizer, allowed)
        if model.adapter_path is not None and train_state is not None:
            _, base = partition(train_state.params, is_adapter)
            header = read_header(model.adapter_path)
            check_base(model.adapter_path, header, model.module.config, fingerprint(base))
        super().__init__(
            model=model,
            train_state=train_state,
            partitioner=partitioner,
            eval_names=eval_names,
            summary_dir=summary_dir,
            train_state_axes=train_state_axes,
            rng=rng,
            learning_rate_fn=optimizer.schedule,
            num_microbatches=num_microbatches,
            weight_metrics_computer=weight_metrics_computer,
        )

    @functools.cached_property
    def _partitioned_train_step(self) -> Any:
        spec = self._partitioner.data_partition_spec

        def train_step(state, batch):
            grads, metrics = gradients(
                self._model, state.params, state.step, batch, self._num_microbatches or 1, spec
            )
            step = state.step
            state, metrics = trainer.apply_grads(
                state,
                grads,
                metrics,
                self._learning_rate_fn(step),
                self._weight_metrics_computer,
            )
            # Of the update, before a method merges and starts anew: as native training's.
            trained, _ = partition(flax_core.unfreeze(state.params), is_trained)
            average = metrics_lib.AveragePerStep
            metrics["gradient_norm"] = average(total=optax.global_norm(grads))
            metrics["parameter_norm"] = average(total=optax.global_norm(trained))
            return end_step(self._model, state, step), metrics

        return self._partitioner.partition(
            train_step,
            in_axis_resources=(self._train_state_axes, spec),
            out_axis_resources=(self._train_state_axes, None),
            donate_argnums=(0,),
        )


def gradients(
    model: Any, params: Any, step: jax.Array, batch: Any, microbatches: int, spec: Any
) -> tuple[Any, Metrics]:
    """(gradients of the trained parameters, T5X's metrics) of a batch, one microbatch after another.

    Args:
      model: of `t5x_integration.models`.
      params: all parameters.
      step: optimizer steps done.
      batch: arrays whose first axis is B.
      microbatches: A, a divisor of B.
      spec: how a batch is partitioned.

    Raises:
      ConfigError: A does not divide B.
    """
    trained, rest = partition(flax_core.unfreeze(params), is_trained)
    make_pass, weights_BL = model.prepare_step(batch, step, microbatches)
    batch_size = len(weights_BL)
    allowed = f"a divisor of the batch size {batch_size}"
    check(batch_size % microbatches == 0, "AdapterTrainer.num_microbatches", microbatches, allowed)

    def one(microbatch, weights_BL, index):
        def loss(trained):
            whole = merge_params(trained, rest)
            return model.loss_fn(whole, microbatch, None, make_pass(weights_BL, index))

        return jax.grad(loss, has_aux=True)(trained)

    if microbatches == 1:
        return one(batch, weights_BL, 0)

    def part(x):
        return x.reshape(microbatches, -1, *x.shape[1:])

    def add(sums, inputs):
        microbatch, weights_BL, index = inputs
        microbatch = jax.tree.map(
            lambda x: trainer.partitioning.with_sharding_constraint(x, spec), microbatch
        )
        grads, metrics = one(microbatch, weights_BL, index)
        return jax.tree.map(jnp.add, sums, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, trained)
    inputs = (jax.tree.map(part, dict(batch)), part(weights_BL), jnp.arange(microbatches))
    grads, stacked = jax.lax.scan(add, zeros, inputs)
    # The metrics' own sums, one microbatch after another.
    parts = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(microbatches)]
    metrics = {
        name: functools.reduce(lambda a, b: a.merge(b), (one[name] for one in parts))
        for name in stacked
    }
    return grads, metrics


def end_step(model: Any, state: Any, step: jax.Array) -> Any:
    """The state after what the adapter's method does at the end of a step (`AdapterConfig.after_step`).

    Args:
      model: of `t5x_integration.models`.
      state: T5X's, after the optimizer's update.
      step: optimizer steps done before it.
    """
    config = model.module.adapter
    if config is None:
        return state
    adapter, base = partition(flax_core.unfreeze(state.params), is_adapter)
    info = StepInfo(step=step + 1, num_steps=model.num_steps, key=step_end_key(model.seed, step))
    adapter, restart = config.after_step(adapter, info)
    optimizer = state._optimizer
    moments = optimizer.state.param_states
    if restart is not None:
        fresh = model.optimizer_def.optax_optimizer.init(split_trained(adapter)[0])
        moments = restart_moments(moments, fresh, restart)
    return state.replace(
        _optimizer=optimizer.replace(
            target=like(state.params, merge_params(adapter, base)),
            state=optimizers.OptimizerState(step=optimizer.state.step, param_states=moments),
        )
    )
