"""Tiny models, and T5X's trainer on them in this process."""

import jax
import numpy as np
from flax import core as flax_core

from sira_jax.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    fresh_adapter,
)
from sira_jax.training.train_state import merge_params, split_params
from tests.tiny import draw, shapes_of

VOCAB = 384
STEPS = 4


def encoder_decoder_config(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 16,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_dim": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "scan_layers": False,
    }
    return EncoderDecoderConfig(**sizes | changes)


def decoder_config(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "mlp_dim": 32,
        "max_positions": 128,
    }
    return DecoderConfig(**sizes | changes)


def base_params(module, seed=0):
    """Frozen parameters drawn by numpy, small enough for a sane loss."""
    return split_params(draw(shapes_of(module, module.init_batch()), seed, scale=0.2))[1]


def fresh_params(module, seed):
    """The base of `base_params` and the adapter as native training draws it."""
    adapter = jax.jit(fresh_adapter, static_argnums=0)(module, jax.random.key(seed))
    return merge_params(base_params(module), adapter)


def example_batches(module, count, *, packed, size=4, length=12):
    """Batches with T5X's names; of an encoder-decoder, packed ones have two examples a row."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        batch = {}
        borders = rng.integers(2, length - 2, size=(size, 1))
        ends = np.minimum(borders + rng.integers(2, length, size=(size, 1)), length)
        place = np.arange(length)
        segments = np.where(place < borders, 1, np.where(place < ends, 2, 0))
        if not packed:
            segments = (place < ends).astype(np.int64)
        starts = np.where(segments == 2, borders, 0)
        tokens = rng.integers(3, VOCAB, size=(size, length)) * (segments > 0)
        is_first = place == starts
        batch["decoder_target_tokens"] = tokens
        shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        batch["decoder_input_tokens"] = np.where(is_first, 0, shifted) * (segments > 0)
        weights = segments > 0
        if isinstance(module, EncoderDecoder):
            batch["encoder_input_tokens"] = rng.integers(3, VOCAB, size=(size, length))
            batch["encoder_input_tokens"] *= segments > 0
        else:
            weights &= place - starts >= 1
        batch["decoder_loss_weights"] = weights
        if packed:
            batch["decoder_segment_ids"] = segments
            batch["decoder_positions"] = np.where(segments > 0, place - starts, 0)
            if isinstance(module, EncoderDecoder):
                batch["encoder_segment_ids"] = segments
                batch["encoder_positions"] = batch["decoder_positions"]
        yield {name: value.astype(np.int32) for name, value in batch.items()}


def t5x_model(module, optimizer, **changes):
    import seqio

    from sira_jax.t5x_integration import models

    vocabulary = seqio.ByteVocabulary()
    common = {"optimizer_def": optimizer, "num_steps": STEPS, "seed": 3} | changes
    if isinstance(module, EncoderDecoder):
        return models.AdapterEncoderDecoderModel(
            module, input_vocabulary=vocabulary, output_vocabulary=vocabulary, **common
        )
    return models.AdapterDecoderOnlyModel(module, vocabulary=vocabulary, **common)


class T5XRun:
    """T5X's trainer from given parameters; `step(batch)` returns the metrics' values."""

    def __init__(self, model, params, *, num_partitions=1, microbatches=None, expert=None):
        from t5x import partitioning, train_state, utils

        from sira_jax.t5x_integration.logical_axes import logical_axis_rules
        from sira_jax.t5x_integration.trainer import AdapterTrainer

        self.partitioner = partitioning.PjitPartitioner(
            num_partitions=num_partitions, logical_axis_rules=logical_axis_rules(expert=expert)
        )
        self.initializer = utils.TrainStateInitializer(
            model.optimizer_def, model.get_initial_variables, {}, self.partitioner
        )
        self.axes = self.initializer.train_state_axes
        del train_state
        state = self.initializer.from_scratch(jax.random.PRNGKey(0))
        if params is not None:
            placed = jax.tree.map(
                lambda new, old: jax.device_put(np.asarray(new), old.sharding),
                flax_core.freeze(params),
                state.params,
            )
            state = state.replace_params(placed)
        self.trainer = AdapterTrainer(
            model=model,
            train_state=state,
            partitioner=self.partitioner,
            eval_names=[],
            summary_dir=None,
            train_state_axes=self.axes,
            rng=jax.random.PRNGKey(0),
            num_microbatches=microbatches,
        )
        self.state = state

    def step(self, batch):
        self.state, metrics = self.trainer._partitioned_train_step(self.state, batch)
        return {
            name: float(metric.compute())
            for name, metric in jax.device_get(metrics).items()
            if not name.startswith("timing/") and "steps" not in getattr(metric, "__dict__", {})
        } | {
            name: float(metric.total)
            for name, metric in jax.device_get(metrics).items()
            if hasattr(metric, "steps") and hasattr(metric, "total")
        }


__all__ = [
    "STEPS",
    "VOCAB",
    "Decoder",
    "EncoderDecoder",
    "T5XRun",
    "base_params",
    "decoder_config",
    "encoder_decoder_config",
    "example_batches",
    "fresh_params",
    "t5x_model",
]
