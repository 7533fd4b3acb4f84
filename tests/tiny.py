"""Small decoders with parameters drawn by numpy: nothing is compiled to make them."""

import flax.linen as nn
import jax
import numpy as np

from sira_jax.models import Decoder, DecoderConfig

VOCAB = 23


def decoder_config(**changes) -> DecoderConfig:
    """Two layers of width 8, four query heads on two key heads."""
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "mlp_dim": 12,
        "max_positions": 64,
    }
    return DecoderConfig(**sizes | changes)


def draw(shapes, seed=0, scale=0.5):
    """Normal arrays in the shapes of a tree; the scales of norms lie around 1, nothing is zero."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.normal(scale=scale, size=shape.shape)
        if path[-1].key == "scale":
            values = 1 + 0.2 * values
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def shapes_of(module, *inputs):
    """Shapes and types of a module's parameters."""
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


def decoder_params(model: Decoder, seed: int = 0, scale: float = 0.5):
    """Parameters of a decoder, adapters included."""
    return draw(shapes_of(model, {"decoder_input_tokens": np.zeros((1, 2), np.int32)}), seed, scale)


def make_batch(lengths, length, *, seed=0, num_tasks=1, vocab=VOCAB, prompt=2):
    """Rows of packed examples: `lengths[row]` are the examples' lengths, the rest is padding.

    The first `prompt` positions of an example carry no loss, as those of an input do not.
    """
    rng = np.random.default_rng(seed)
    shape = (len(lengths), length)
    batch = {
        "decoder_input_tokens": np.zeros(shape, np.int32),
        "decoder_target_tokens": np.zeros(shape, np.int32),
        "decoder_loss_weights": np.zeros(shape, np.float32),
        "decoder_segment_ids": np.zeros(shape, np.int32),
        "decoder_positions": np.zeros(shape, np.int32),
        "task_ids": np.zeros(shape, np.int32),
    }
    for row, examples in enumerate(lengths):
        start = 0
        for number, size in enumerate(examples):
            here = (row, slice(start, start + size))
            tokens = rng.integers(1, vocab, size + 1)
            batch["decoder_input_tokens"][here] = tokens[:-1]
            batch["decoder_target_tokens"][here] = tokens[1:]
            batch["decoder_loss_weights"][here] = np.arange(size) >= prompt
            batch["decoder_segment_ids"][here] = number + 1
            batch["decoder_positions"][here] = np.arange(size)
            batch["task_ids"][here] = rng.integers(num_tasks)
            start += size
        assert start <= length
    return batch
