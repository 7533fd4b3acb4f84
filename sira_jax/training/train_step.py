"""The jitted training step and the loss it shares with evaluation.

Only the adapter's trained parameters are differentiated and updated; the frozen tree is an argument that no gradient or
optimizer state is ever made for. What a method does besides (a second pass, a schedule, merging on the way) it does through
the hooks of `AdapterConfig`.

Axis letters: B batch, T length, N = B * T positions, D width, V vocabulary, A microbatches of a step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sira_jax.adapters import SecondPass, StepInfo, split_trained
from sira_jax.models import Model
from sira_jax.placement import constrain
from sira_jax.routing import RouterStats
from sira_jax.training.bad_loss import is_bad
from sira_jax.training.optimizers import restart_moments
from sira_jax.training.train_state import TrainState, merge_params

Batch = Mapping[str, jax.Array]

# Purposes of the one seed; a key is folded by step and then by purpose.
RNG_STREAMS = ("dropout", "expert_dropout", "expert_choice")
# What the key of a step's end (`AdapterConfig.after_step`) is folded with; microbatches count from 0 and never get there.
_STEP_END = 2**31 - 1


def step_rngs(
    seed: int, step: jax.Array | int, microbatch: jax.Array | int = 0, second_pass: bool = False
) -> dict:
    """Keys of one forward pass: a pure function of seed, step, microbatch and purpose, so that resuming repeats them."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), microbatch)
    first = len(RNG_STREAMS) if second_pass else 0
    return {
        name: jax.random.fold_in(key, first + purpose) for purpose, name in enumerate(RNG_STREAMS)
    }


def step_end_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of `AdapterConfig.after_step` at the end of the step that `step` steps were done before."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _STEP_END)


def symmetric_kl(first_V: jax.Array, second_V: jax.Array) -> jax.Array:
    """(KL(p || q) + KL(q || p)) / 2 of the distributions of two arrays of logits, nats, over the last axis."""
    log_p_V = jax.nn.log_softmax(first_V.astype(jnp.float32))
    log_q_V = jax.nn.log_softmax(second_V.astype(jnp.float32))
    return 0.5 * jnp.sum((jnp.exp(log_p_V) - jnp.exp(log_q_V)) * (log_p_V - log_q_V), axis=-1)


def token_losses(
    model: Model,
    params: Any,
    features_BTD: jax.Array,
    batch: Batch,
    chunk_size: int,
    second_BTD: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Weighted (cross-entropy in nats, 1 if the most likely token is right) of each position, float32 (B, T) each.

    With `second_BTD`, the features of a second pass, also the weighted symmetric KL divergence between the two, in nats.

    With `chunk_size` > 0 the positions that carry a loss are moved to the front and their logits computed `chunk_size` at a
    time, so that prompts and padding cost no vocabulary product and the full (N, V) array is never held. The result is
    the same to rounding.
    """
    shape = batch["decoder_target_tokens"].shape
    features_ND = features_BTD.reshape(-1, features_BTD.shape[-1])
    targets_N = batch["decoder_target_tokens"].reshape(-1)
    weights_N = batch["decoder_loss_weights"].reshape(-1).astype(jnp.float32)

    def losses(targets, weights, features, *second):
        logits = model.apply({"params": params}, features, method="logits")
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        others = [model.apply({"params": params}, other, method="logits") for other in second]
        return tuple(
            value * weights for value in (nats, right, *(symmetric_kl(logits, o) for o in others))
        )

    parts = [targets_N, weights_N, features_ND]
    if second_BTD is not None:
        parts.append(second_BTD.reshape(features_ND.shape))
    if chunk_size == 0:
        return tuple(values_N.reshape(shape) for values_N in losses(*parts))
    count = targets_N.shape[0]
    order_N = jnp.argsort(weights_N == 0, stable=True)
    padding = -count % chunk_size

    def chunks(values):
        values = jnp.pad(values[order_N], [(0, padding)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(-1, chunk_size, *values.shape[1:])

    # Recomputing the logits in the backward pass costs one more product and saves holding them. Around the body and
    # not around the branch: what a branch saves, the vocabulary table too, would be stacked for all chunks.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(_, chunk):
        zeros = (jnp.zeros(chunk_size, jnp.float32),) * (len(parts) - 1)
        has_loss = jnp.any(chunk[1] != 0)
        return None, jax.lax.cond(has_loss, losses, lambda *_: zeros, *chunk)

    _, results = jax.lax.scan(one_chunk, None, tuple(chunks(part) for part in parts))

    def unchunk(values):
        values_N = jnp.zeros(count, jnp.float32).at[order_N].set(values.reshape(-1)[:count])
        return values_N.reshape(shape)

    return tuple(unchunk(values) for values in results)


def auxiliary_loss(sown: Mapping[str, Any]) -> jax.Array:
    """Mean over all adapters of the weighted auxiliary losses they sowed; 0 where they sow none [C: mean, as flaxformer]."""
    leaves = jax.tree.leaves(sown)
    if not leaves:
        return jnp.float32(0)
    return jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in leaves])) / sum(
        leaf.size for leaf in leaves
    )


def router_stats(sown: Mapping[str, Any]) -> list[RouterStats]:
    """The router statistics in a `metrics` collection, one for each adapted projection, in the order of the tree."""

    def is_stats(x):
        return isinstance(x, RouterStats)

    return [x for x in jax.tree.leaves(sown, is_leaf=is_stats) if is_stats(x)]


_ROUTER_SUMS = (
    "dropped_pairs",
    "selected_pairs",
    "entropy_sum",
    "confidence_sum",
    "tokens",
    "task_entropy_sum_Z",
    "task_tokens_Z",
)


def router_sums(sown: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Sums over all routers of the model, which add up over microbatches; empty without routers.

    Kept pairs per expert are summed over the routers with the same number of experts, `kept_pairs_E` for each E.
    """
    stats = router_stats(sown)
    if not stats:
        return {}

    def total(x, axes):
        # A scan stacks layers on the first axis.
        return jnp.sum(x, axis=tuple(range(x.ndim - axes)))

    sums = {
        name: sum(total(getattr(one, name), 1 if name.endswith("_Z") else 0) for one in stats)
        for name in _ROUTER_SUMS
    }
    for one in stats:
        name = f"kept_pairs_{one.kept_pairs_E.shape[-1]}"
        sums[name] = sums.get(name, 0.0) + total(one.kept_pairs_E, 1)
    return sums


def router_summary(
    sums: Mapping[str, jax.Array], task_names: Sequence[str] = ()
) -> dict[str, jax.Array]:
    """Metrics from `router_sums`, over all routers of the model; empty from nothing.

    router/dropped_share, router/gate_entropy (nats), router/confidence; router/expert_load/NNN, the share of the kept pairs
    that expert NNN of each router took (router/expert_load_of_E/NNN where overrides give routers different numbers of
    experts); and with several tasks router/gate_entropy/TASK, not a number for a task without tokens in the batch.
    """
    if not sums:
        return {}
    tokens = jnp.maximum(sums["tokens"], 1.0)
    metrics = {
        "router/dropped_share": sums["dropped_pairs"] / jnp.maximum(sums["selected_pairs"], 1.0),
        "router/gate_entropy": sums["entropy_sum"] / tokens,
        "router/confidence": sums["confidence_sum"] / tokens,
    }
    kinds = [name for name in sums if name.startswith("kept_pairs_")]
    for name in kinds:
        pairs_E = sums[name]
        load_E = pairs_E / jnp.maximum(jnp.sum(pairs_E), 1.0)
        place = "router/expert_load" if len(kinds) == 1 else f"router/expert_load_of_{len(load_E)}"
        metrics |= {f"{place}/{expert:03d}": load for expert, load in enumerate(load_E)}
    if len(task_names) > 1:
        entropy_Z = sums["task_entropy_sum_Z"] / sums["task_tokens_Z"]
        metrics |= {
            f"router/gate_entropy/{task}": entropy_Z[index] for index, task in enumerate(task_names)
        }
    return metrics


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    num_steps: int,
    accumulation_steps: int = 1,
    loss_chunk_size: int = 0,
    task_names: Sequence[str] = (),
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns step(state, frozen, batch, loss_limit=None) -> (state, metrics), not yet jitted.

    The loss is the mean cross-entropy over the target tokens of the whole batch plus the auxiliary loss. With accumulation,
    microbatches are rows [0, B/A), [B/A, 2B/A), ...; each is weighted by its target tokens, so that the cross-entropy's
    gradient is that of the whole batch, and auxiliary losses are averaged. An adapter's second pass adds its consistency
    term to the auxiliary loss.

    With a `loss_limit`, a scalar, a step whose loss is over it or not finite (`bad_loss.is_bad`) changes neither the trained
    parameters nor the optimizer's moments; the learning rate's schedule and the adapter's own (`after_step`) go on, and the
    metric `skipped` says so: 0 or 1.

    Args:
      model: decoder with the adapter.
      optimizer: of the trained parameters.
      schedule: its learning rate, for the metrics.
      seed: the one seed.
      num_steps: steps of the whole training, for adapters with a schedule.
      accumulation_steps: A.
      loss_chunk_size: see TrainConfig.
      task_names: for per-task router metrics.

    Metrics, float32: loss (nats a target token), accuracy, auxiliary_loss, gradient_norm (before clipping), parameter_norm
    (of the trained parameters after the update), learning_rate, tokens (real ones), target_tokens, and those of
    `router_summary`.
    """
    second = model.adapter.second_pass if model.adapter is not None else None

    def loss_fn(trained, buffers, frozen, batch, progress, index, step, total_weight):
        params = merge_params(trained, buffers, frozen)

        def run(params, second_pass):
            return model.apply(
                {"params": params},
                batch,
                deterministic=False,
                progress=progress,
                rngs=step_rngs(seed, step, index, second_pass),
                method="features",
                mutable=["losses", "metrics"],
            )

        features_BTD, sown = run(params, second_pass=False)
        auxiliary = auxiliary_loss(sown.get("losses", {})) / accumulation_steps
        second_BTD = _second_features(second, run, params) if second else None
        nats_BT, right_BT, *divergence_BT = token_losses(
            model, params, features_BTD, batch, loss_chunk_size, second_BTD
        )
        nats, right = jnp.sum(nats_BT), jnp.sum(right_BT)
        if second:
            factor = 1.0 if second.both_gradients else 2.0
            divergence = jnp.sum(divergence_BT[0]) / total_weight
            auxiliary += _scale_gradient(second.weight * divergence, factor)
        metrics = {
            "loss": nats / total_weight,
            "accuracy": right / total_weight,
            "auxiliary_loss": auxiliary,
        }
        metrics["router"] = router_sums(sown.get("metrics", {}))
        return nats / total_weight + auxiliary, metrics

    def step(state: TrainState, frozen: Any, batch: Batch, loss_limit: jax.Array | None = None):
        total_weight = jnp.maximum(jnp.sum(batch["decoder_loss_weights"]), 1.0)
        trained, buffers = split_trained(state.adapter)
        progress = state.step.astype(jnp.float32) / num_steps

        def gradient(microbatch, index):
            return jax.grad(loss_fn, has_aux=True)(
                trained, buffers, frozen, microbatch, progress, index, state.step, total_weight
            )

        if accumulation_steps == 1:
            grads, metrics = gradient(batch, 0)
        else:
            grads, metrics = _accumulate(gradient, batch, accumulation_steps)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
        applied = optax.apply_updates(trained, updates)
        if loss_limit is None:
            trained = applied
        else:
            bad = is_bad(metrics | _norms(grads, applied), loss_limit)
            trained = jax.tree.map(lambda old, new: jnp.where(bad, old, new), trained, applied)
            optimizer_state = restart_moments(optimizer_state, state.optimizer, bad)
            metrics["skipped"] = bad.astype(jnp.float32)
        adapter = merge_params(trained, buffers)
        if model.adapter is not None:
            key = step_end_key(seed, state.step)
            info = StepInfo(step=state.step + 1, num_steps=num_steps, key=key)
            adapter, restart = model.adapter.after_step(adapter, info)
            if restart is not None:
                fresh = optimizer.init(split_trained(adapter)[0])
                optimizer_state = restart_moments(optimizer_state, fresh, restart)
        metrics |= router_summary(metrics.pop("router"), task_names)
        metrics |= _norms(grads, applied) | {
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": jnp.sum(batch["decoder_segment_ids"] > 0, dtype=jnp.float32),
            "target_tokens": jnp.sum(batch["decoder_loss_weights"]),
        }
        new_state = TrainState(step=state.step + 1, adapter=adapter, optimizer=optimizer_state)
        return new_state, metrics

    return step


def _norms(grads: Any, trained: Any) -> dict[str, jax.Array]:
    return {
        "gradient_norm": optax.global_norm(grads),
        "parameter_norm": optax.global_norm(trained),
    }


def _second_features(second: SecondPass, run: Callable, params: Any) -> jax.Array:
    features_BTD, _ = run(
        params if second.both_gradients else jax.lax.stop_gradient(params), second_pass=True
    )
    return features_BTD


def _scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """x, with `factor` times its gradient."""
    return factor * x + (1 - factor) * jax.lax.stop_gradient(x)


def _accumulate(gradient: Callable, batch: Batch, parts: int) -> tuple[Any, dict]:
    """Sums `gradient` over microbatches, one after another, holding one microbatch's activations at a time."""
    split = {
        name: constrain(x.reshape(parts, -1, *x.shape[1:]), None, "batch", *[None] * (x.ndim - 1))
        for name, x in batch.items()
    }
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split), 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums, part):
        index, microbatch = part
        return jax.tree.map(jnp.add, sums, gradient(microbatch, index)), None

    return jax.lax.scan(add, zeros, (jnp.arange(parts), split))[0]
