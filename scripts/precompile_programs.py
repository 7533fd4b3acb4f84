"""The programs that scripts/precompile.py compiles: train and decode steps of an adapter, and those of the frozen floor.

Nothing is computed: parameters, state and batch are shapes with shardings on the devices of a described topology.

The frozen floor is the least that any adapter's step contains. Of training: the same model without adapters, the same loss
and metrics, forwards, and backwards from the loss through every layer to the token embeddings, with the same
rematerialisation. So that this backward pass has a result, the floor trains one number that the embeddings are scaled by; no
gradient is taken of any frozen parameter, and no optimizer runs. (An adapter's own backward pass ends at the first layer's
inputs, which is less than a layer away.) Of decoding: the same model without adapters.

Axis letters: B rows, T tokens a row, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sira_jax.adapters import AdapterConfig, split_trained
from sira_jax.adapters.base import STACKED
from sira_jax.models import EncoderDecoderConfig, Model, ModelConfig, make_model
from sira_jax.training import partitioning
from sira_jax.training.axis_rules import Rules
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.decoding import decode_step, prefill
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import (
    TrainState,
    abstract_adapter,
    abstract_params,
    fresh_state,
    merge_params,
    split_params,
)
from sira_jax.training.train_step import make_train_step, token_losses

_NUM_STEPS = 1000  # of the schedules, which cost the same whatever their length
_EMBEDDER = "token_embedder"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all compared programs share.

    Attributes:
      config: the base model.
      mesh: devices, real or described.
      rules: the table of logical axes.
      batch_size: rows of a training step, over all devices.
      length: tokens a row; of the encoder's rows where there is an encoder.
      target_length: tokens of the decoder's rows behind an encoder.
      accumulation_steps: microbatches of a training step.
      loss_chunk_size: see TrainConfig.
      decode_batch: rows of a decode step, over all devices.
      cache_length: slots of the decode step's cache.
    """

    config: ModelConfig
    mesh: Mesh
    rules: Rules
    batch_size: int
    length: int
    target_length: int
    accumulation_steps: int
    loss_chunk_size: int
    decode_batch: int
    cache_length: int

    @property
    def has_encoder(self) -> bool:
        """Whether the model reads two streams."""
        return isinstance(self.config, EncoderDecoderConfig)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function with the shapes it is compiled for.

    Attributes:
      jitted: the jitted function.
      inputs: its arguments' shapes and shardings, by what they are: "base", "adapter", "optimizer", "cache", "batch".
      order: the arguments from `inputs`.
      trained: the trained parameters' shapes and shardings.
    """

    jitted: Any
    inputs: Mapping[str, Any]
    order: tuple[Any, ...]
    trained: Any

    def lower(self) -> Any:
        """The traced and lowered program, to be compiled."""
        return self.jitted.lower(*self.order)


def place(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a tree of shardings, or one sharding for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of placed shapes."""
    return jax.tree.map(lambda x: x.sharding, tree)


def abstract_frozen(setting: Setting, model: Model) -> Any:
    """Shapes and shardings of the base's parameters."""
    abstract = split_params(abstract_params(model))[1]
    shardings = partitioning.param_shardings(abstract, setting.mesh, setting.rules)
    return place(nn.unbox(abstract), shardings)


def abstract_batch(setting: Setting) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the input pipeline makes it of packed examples."""
    names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
    length = setting.target_length if setting.has_encoder else setting.length
    shapes = {f"decoder_{name}": length for name in names} | {"task_ids": length}
    if setting.has_encoder:
        own = ("input_tokens", "segment_ids", "positions", "task_ids")
        shapes |= {f"encoder_{name}": setting.length for name in own}
    sharding = partitioning.batch_sharding(setting.mesh, setting.rules)
    return {
        name: jax.ShapeDtypeStruct(
            (setting.batch_size, tokens),
            jnp.float32 if name.endswith("weights") else jnp.int32,
            sharding=sharding,
        )
        for name, tokens in shapes.items()
    }


def train_program(setting: Setting, adapter: AdapterConfig | None) -> Program:
    """The train step of an adapter, as `training.loop` compiles it; of the frozen floor without one."""
    model = make_model(setting.config, adapter, num_tasks=1 if adapter else 0)
    frozen, batch = abstract_frozen(setting, model), abstract_batch(setting)
    everywhere = partitioning.replicated(setting.mesh)
    if adapter is None:
        step = _floor_step(model, setting)
        state = trained = place(jax.ShapeDtypeStruct((), jnp.float32), everywhere)
        inputs = {"base": frozen, "adapter": {}, "optimizer": {}, "batch": batch}
    else:
        step, state = _adapter_step(model, setting)
        trained = split_trained(state.adapter)[0]
        inputs = {
            "base": frozen,
            "adapter": state.adapter,
            "optimizer": state.optimizer,
            "batch": batch,
        }
    jitted = jax.jit(
        partitioning.placed(step, setting.mesh, setting.rules),
        donate_argnums=0,
        out_shardings=(shardings_of(state), everywhere),
    )
    return Program(jitted, inputs, (state, frozen, batch), trained)


def _adapter_step(model: Model, setting: Setting) -> tuple[Callable, TrainState]:
    optimizer = make_optimizer(OptimizerConfig(), _NUM_STEPS)
    step = make_train_step(
        model,
        optimizer,
        make_schedule(OptimizerConfig(), _NUM_STEPS),
        seed=0,
        num_steps=_NUM_STEPS,
        accumulation_steps=setting.accumulation_steps,
        loss_chunk_size=setting.loss_chunk_size,
        task_names=("task",),
    )
    everywhere = partitioning.replicated(setting.mesh)
    adapter = abstract_adapter(model, setting.mesh, setting.rules)
    shapes = jax.eval_shape(lambda tree: fresh_state(tree, optimizer), adapter)
    trained = split_trained(adapter)[0]
    optimizer_shardings = partitioning.optimizer_shardings(
        shapes.optimizer, trained, shardings_of(trained), setting.mesh
    )
    state = TrainState(
        step=place(shapes.step, everywhere),
        adapter=adapter,
        optimizer=place(shapes.optimizer, optimizer_shardings),
    )
    return step, state


def _floor_step(model: Model, setting: Setting) -> Callable:
    """step(scale, frozen, batch) -> (scale, metrics); see the module's text."""

    def loss_fn(scale, frozen, batch, total_weight):
        def scaled(call, args, kwargs, context):
            result = call(*args, **kwargs)
            is_embedding = context.module.name == _EMBEDDER and context.method_name == "__call__"
            return result * scale.astype(result.dtype) if is_embedding else result

        with nn.intercept_methods(scaled):
            features_BTD = model.apply(
                {"params": frozen}, batch, deterministic=False, method="features"
            )
        nats_BT, right_BT = token_losses(
            model, frozen, features_BTD, batch, setting.loss_chunk_size
        )
        loss = jnp.sum(nats_BT) / total_weight
        return loss, {"loss": loss, "accuracy": jnp.sum(right_BT) / total_weight}

    def step(scale, frozen, batch):
        total_weight = jnp.maximum(jnp.sum(batch["decoder_loss_weights"]), 1.0)
        steps = setting.accumulation_steps
        parts = {name: x.reshape(steps, -1, *x.shape[1:]) for name, x in batch.items()}

        def add(sums, part):
            new = jax.grad(loss_fn, has_aux=True)(scale, frozen, part, total_weight)
            return jax.tree.map(jnp.add, sums, new), None

        zero = jnp.float32(0)
        sums = (zero, {"loss": zero, "accuracy": zero})
        if steps == 1:
            (gradient, metrics), _ = add(sums, batch)
        else:
            (gradient, metrics), _ = jax.lax.scan(add, sums, parts)
        metrics["tokens"] = jnp.sum(batch["decoder_segment_ids"] > 0, dtype=jnp.float32)
        return scale - gradient, metrics

    return step


def decode_program(setting: Setting, adapter: AdapterConfig | None) -> Program:
    """One step of greedy decoding, with any number of the cache's slots filled: the next token of each row."""
    model = make_model(setting.config, adapter)
    frozen = abstract_frozen(setting, model)
    weights = {} if adapter is None else abstract_adapter(model, setting.mesh, setting.rules)
    params = merge_params(weights, frozen)
    rows = partitioning.batch_sharding(setting.mesh, setting.rules)
    tokens_B1 = jax.ShapeDtypeStruct((setting.decode_batch, 1), jnp.int32, sharding=rows)
    batch = {"decoder_input_tokens": tokens_B1, "decoder_positions": tokens_B1}
    cache = _abstract_cache(setting, model, params)

    def step(cache, params, batch):
        logits_BV, cache = decode_step(model, params, cache, batch, setting.cache_length)
        return cache, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    jitted = jax.jit(
        partitioning.placed(step, setting.mesh, setting.rules),
        donate_argnums=0,
        out_shardings=(shardings_of(cache), rows),
    )
    inputs = {"base": frozen, "adapter": weights, "cache": cache, "batch": batch}
    return Program(jitted, inputs, (cache, params, batch), weights)


def _abstract_cache(setting: Setting, model: Model, params: Any) -> Any:
    """What prompts leave in the cache: rows lie as the batch's do, heads as those of the keys' kernel."""
    rows = setting.decode_batch
    prompt = {
        name: jax.ShapeDtypeStruct((rows, 1), jnp.int32)
        for name in ("decoder_input_tokens", "decoder_segment_ids", "decoder_positions")
    }
    if setting.has_encoder:
        read = jax.ShapeDtypeStruct((rows, setting.length), jnp.int32)
        prompt |= {"encoder_input_tokens": read, "encoder_segment_ids": read}
    run = functools.partial(prefill, model, cache_length=setting.cache_length)
    _, cache = jax.eval_shape(lambda params, batch: run(params, batch), params, prompt)

    def sharding(path, leaf):
        stacked = setting.config.scan_layers and any(entry.key == STACKED for entry in path)
        own = leaf.ndim - stacked
        # Keys and values are (B, S, K, P), what else there is has rows first, or is a number.
        names = ("batch", None, "kv_heads", None) if own == 4 else ("batch", *(None,) * (own - 1))
        names = (None,) * stacked + names[:own]
        spec = partitioning.axes_spec(names, leaf.shape, setting.mesh, setting.rules)
        return NamedSharding(setting.mesh, spec)

    return place(cache, jax.tree_util.tree_map_with_path(sharding, cache))
