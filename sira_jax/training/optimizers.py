"""Optimizers and learning-rate schedules from their configs, through optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sira_jax.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear warm-up from 0, then the named decay; see OptimizerConfig."""
    peak, warmup = config.learning_rate, config.warmup_steps
    # The last step has index num_steps - 1, and is to have the end's rate.
    decay_steps = max(1, num_steps - 1 - warmup)
    if config.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * config.end_factor, decay_steps)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_factor)
    else:
        # peak * sqrt(warmup / step), counted from the end of the warm-up, where it equals the peak.
        start = max(1, warmup)

        def decay(step):
            # Also asked during the warm-up, with negative steps, though not used there.
            return peak * (start / (start + jnp.maximum(step, 0))) ** 0.5

    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def restart_moments(state: Any, fresh: Any, restart: jax.Array) -> Any:
    """`fresh` where the scalar `restart` is true, else `state`; the learning-rate schedule's step goes on in either case."""

    def is_schedule(x):
        return isinstance(x, optax.ScaleByScheduleState)

    def choose(old, new):
        if is_schedule(old):
            return old
        return jnp.where(restart, new, old)

    return jax.tree.map(choose, state, fresh, is_leaf=is_schedule)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW or Adafactor with the schedule of `make_schedule`."""
    schedule = make_schedule(config, num_steps)
    if config.name == "adamw":
        update = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
    else:
        # Put together here, since optax.adafactor does not scale the decay by the learning rate as AdamW does, and
        # scales updates by the parameter, which would hold LoRA's B at its initial zero.
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
