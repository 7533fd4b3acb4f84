"""Checkpoints as plain T5X writes them: its own T5, its own optimizer, none of this package. Imported where T5X is there."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from t5x import adafactor, checkpoints, models, partitioning, utils
from t5x.examples.t5 import network

FORMATS = ("t5x", "orbax")


def plain_model(**sizes):
    """T5X's minimal T5 with the sizes of `tiny_t5x.encoder_decoder`."""
    defaults = {
        "vocab_size": 384,
        "dtype": jnp.float32,
        "emb_dim": 16,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_dim": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "mlp_activations": ("gelu", "linear"),
        "dropout_rate": 0.0,
    }
    vocabulary = seqio.ByteVocabulary()
    return models.EncoderDecoderModel(
        network.Transformer(network.T5Config(**defaults | sizes)),
        vocabulary,
        vocabulary,
        adafactor.Adafactor(
            decay_rate=0.8, logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
    )


def write_checkpoint(directory, step=7, file_format="t5x", seed=0, **sizes):
    """Saves a random base and returns (path of the checkpoint, its model, its parameters)."""
    model = plain_model(**sizes)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    shapes = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens"), (2, 4))
    types = dict.fromkeys(shapes, np.int32)
    initializer = utils.TrainStateInitializer(
        model.optimizer_def, model.get_initial_variables, shapes, partitioner, types
    )
    state = initializer.from_scratch(jax.random.PRNGKey(seed)).replace_step(jnp.int32(step))
    writer = {
        "t5x": checkpoints.Checkpointer,
        "orbax": functools.partial(_orbax),
    }[file_format]
    writer(initializer.global_train_state_shape, partitioner, str(directory)).save(state)
    return str(Path(directory) / f"checkpoint_{step}"), model, jax.device_get(state.params)


class _orbax:
    def __init__(self, shapes, partitioner, directory):
        self._manager = checkpoints.OrbaxCheckpointManagerInterface(directory, shapes, partitioner)

    def save(self, state):
        self._manager.save(state)
        self._manager.wait_until_finished()
        self._manager.close()
