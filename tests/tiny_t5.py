"""Small encoder-decoders with parameters drawn by numpy, and batches for them."""

import jax
import numpy as np

from sira_jax.models import EncoderDecoder, EncoderDecoderConfig
from tests.tiny import VOCAB, draw, shapes_of


def t5_config(**changes) -> EncoderDecoderConfig:
    """Three and two layers of width 8, three heads of width 4; distances of 8 and more share a bucket."""
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 8,
        "num_heads": 3,
        "head_dim": 4,
        "mlp_dim": 12,
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "relpos_num_buckets": 8,
        "relpos_max_distance": 8,
        "max_positions": 64,
    }
    return EncoderDecoderConfig(**sizes | changes)


def t5_params(model: EncoderDecoder, seed: int = 0, scale: float = 0.4):
    """Parameters of an encoder-decoder, adapters included."""
    return draw(shapes_of(model, model.init_batch()), seed, scale)


def layers_apart(params, config: EncoderDecoderConfig):
    """The parameters of scanned layers, as those of layers kept apart."""
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    out = dict(params)
    for stack, count in counts.items():
        rest = {name: value for name, value in params[stack].items() if name != "layers"}
        for index in range(count):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], params[stack]["layers"])
            rest[f"layers_{index}"] = layer
        out[stack] = rest
    return out


def t5_batch(pairs, lengths, *, seed=0, num_tasks=1, vocab=VOCAB, start=0):
    """Rows of packed examples.

    Args:
      pairs: for each row, the (input, target) lengths of its examples.
      lengths: (S, T) of the arrays.
      seed: of the tokens.
      num_tasks: each example is of a random one of so many tasks.
      vocab: tokens are drawn from 1..vocab - 1.
      start: the token that opens a target's input.
    """
    rng = np.random.default_rng(seed)
    batch = {}
    for side, length in zip(("encoder", "decoder"), lengths, strict=True):
        names = [f"{side}_{name}" for name in ("input_tokens", "segment_ids", "positions")]
        names += (
            ["encoder_task_ids"] if side == "encoder" else ["task_ids", "decoder_target_tokens"]
        )
        batch |= {name: np.zeros((len(pairs), length), np.int32) for name in names}
    batch["decoder_loss_weights"] = np.zeros((len(pairs), lengths[1]), np.float32)
    for row, examples in enumerate(pairs):
        places = [0, 0]
        for number, sizes in enumerate(examples):
            task = rng.integers(num_tasks)
            inputs, targets = (rng.integers(1, vocab, size) for size in sizes)
            enc, dec = (
                (row, slice(place, place + size)) for place, size in zip(places, sizes, strict=True)
            )
            batch["encoder_input_tokens"][enc] = inputs
            batch["decoder_target_tokens"][dec] = targets
            batch["decoder_input_tokens"][dec] = [start, *targets[:-1]]
            batch["decoder_loss_weights"][dec] = 1
            for side, here, size in (("encoder", enc, sizes[0]), ("decoder", dec, sizes[1])):
                batch[f"{side}_segment_ids"][here] = number + 1
                batch[f"{side}_positions"][here] = np.arange(size)
            batch["encoder_task_ids"][enc] = batch["task_ids"][dec] = task
            places = [place + size for place, size in zip(places, sizes, strict=True)]
        assert places[0] <= lengths[0]
        assert places[1] <= lengths[1]
    return batch
