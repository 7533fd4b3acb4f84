"""Tiny models, batches with T5X's names, and T5X's trainer on them in this process. T5X is imported when it is used."""

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
SEED = 3
MISSING = "T5X is not on the path: make test-t5x T5X_PATH=... AIRIO_PATH=..."


def encoder_decoder(adapter, **changes):
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 16,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_dim": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "scan_layers": False,
    }
    return EncoderDecoder(EncoderDecoderConfig(**sizes | changes), adapter)


def decoder(adapter, **changes):
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
    return Decoder(DecoderConfig(**sizes | changes), adapter)


def random_params(module, seed=0, scale=0.2):
    """Parameters drawn by numpy, the adapter's too."""
    return draw(shapes_of(module, module.init_batch()), seed, scale)


def fresh_params(module):
    """A base drawn by numpy, and the adapter as native training draws it from SEED."""
    adapter = jax.jit(fresh_adapter, static_argnums=0)(module, jax.random.key(SEED))
    return merge_params(split_params(random_params(module))[1], adapter)


def example_batches(module, count, *, packed, size=4, length=12):
    """Batches as SeqIO's feature converters make them; packed ones have up to two examples a row."""
    rng = np.random.default_rng(1)
    place = np.arange(length)
    two_sided = isinstance(module, EncoderDecoder)
    for _ in range(count):
        borders = rng.integers(3, length - 2, size=(size, 1))
        ends = np.minimum(borders + rng.integers(2, length, size=(size, 1)), length)
        segments = np.where(place < borders, 1, np.where(place < ends, 2, 0))
        if not packed:
            segments = (place < ends).astype(np.int64)
        starts = np.where(segments == 2, borders, 0)
        tokens = rng.integers(3, VOCAB, size=(size, length)) * (segments > 0)
        shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        batch = {
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": np.where(place == starts, 0, shifted) * (segments > 0),
            # Of a decoder alone, the first two of an example are its input.
            "decoder_loss_weights": (segments > 0) & (two_sided | (place - starts >= 2)),
        }
        if two_sided:
            batch["encoder_input_tokens"] = rng.integers(3, VOCAB, tokens.shape) * (segments > 0)
        if packed:
            positions = np.where(segments > 0, place - starts, 0)
            for side in ("encoder", "decoder") if two_sided else ("decoder",):
                batch |= {f"{side}_segment_ids": segments, f"{side}_positions": positions}
        yield {name: value.astype(np.int32) for name, value in batch.items()}


def native_batch(batch):
    """The same rows as native training has them."""
    segments = (batch["decoder_target_tokens"] > 0).astype(np.int32)
    weights = batch["decoder_loss_weights"].astype(np.float32)
    return {"decoder_segment_ids": segments} | batch | {"decoder_loss_weights": weights}


def t5x_model(module, optimizer=None, **changes):
    """The module as T5X's model, on bytes."""
    import seqio

    from sira_jax.t5x_integration import models
    from sira_jax.t5x_integration import optimizer as optimizers

    common = {
        "module": module,
        "optimizer_def": optimizer or optimizers.adapter_optimizer(STEPS),
        "num_steps": STEPS,
        "seed": SEED,
    }
    vocabulary = seqio.ByteVocabulary()
    if isinstance(module, EncoderDecoder):
        vocabularies = {"input_vocabulary": vocabulary, "output_vocabulary": vocabulary}
        return models.AdapterEncoderDecoderModel(**common | vocabularies | changes)
    return models.AdapterDecoderOnlyModel(**common | {"vocabulary": vocabulary} | changes)


def make_partitioner(num_partitions=1, **axes):
    from t5x import partitioning

    from sira_jax.t5x_integration.logical_axes import logical_axis_rules

    return partitioning.PjitPartitioner(
        num_partitions=num_partitions, logical_axis_rules=logical_axis_rules(**axes)
    )


class T5XRun:
    """T5X's trainer from given parameters, or from those that T5X initialises."""

    def __init__(self, model, params=None, *, microbatches=None, partitioner=None):
        from t5x import utils

        from sira_jax.t5x_integration.trainer import AdapterTrainer

        self.model = model
        self.partitioner = partitioner or make_partitioner()
        self.initializer = utils.TrainStateInitializer(
            model.optimizer_def, model.get_initial_variables, {}, self.partitioner
        )
        self.state = self.initializer.from_scratch(jax.random.PRNGKey(0))
        if params is not None:
            params = flax_core.freeze(params)
            placed = jax.tree.map(
                lambda new, old: jax.device_put(np.asarray(new), old.sharding),
                params,
                self.state.params,
            )
            self.state = self.state.replace_params(placed)
        self.trainer = AdapterTrainer(
            model=model,
            train_state=self.state,
            partitioner=self.partitioner,
            eval_names=[],
            summary_dir=None,
            train_state_axes=self.initializer.train_state_axes,
            rng=jax.random.PRNGKey(0),
            num_microbatches=microbatches,
        )

    def step(self, batch):
        """Trains on a batch and returns the metrics' values of this step."""
        self.state, metrics = self.trainer._partitioned_train_step(self.state, batch)
        return {
            name: value(metric)
            for name, metric in jax.device_get(metrics).items()
            if not name.startswith("timing/")
        }

    @property
    def params(self):
        return jax.device_get(flax_core.unfreeze(self.state.params))


def value(metric):
    from t5x import metrics

    if isinstance(metric, metrics.AveragePerStep):
        return float(metric.total)
    return float(metric.compute())
