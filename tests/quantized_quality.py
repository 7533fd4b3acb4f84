"""What few bits cost a real model: stories260K on text that it draws itself.

    python -m tests.quantized_quality

Prints, for each way of holding the projections, the mean loss on 64 drawn stories of 200 tokens, nats a token, and by how much
it is over that of the whole model: on text that the whole model drew, the expectation of that is the KL divergence between the
two.
"""

import tempfile

import jax
import numpy as np
import optax

from sira_jax.checkpoints import load_base_model
from sira_jax.models import Decoder
from sira_jax.quantized import KINDS
from sira_jax.training.config import DecodeConfig
from sira_jax.training.decoding import generate
from tests import make_stories260k, stories260k

STORIES, LENGTH = 64, 200


def losses(folder: str, stories: int = STORIES, length: int = LENGTH) -> dict[str, float]:
    """{kind: nats a token}; the text is drawn by the whole model with seed 0."""
    whole = load_base_model(folder)
    model = Decoder(whole.config)
    config = DecodeConfig(strategy="sample", max_new_tokens=length, batch_size=stories)
    drawn = generate(model, whole.params, [[stories260k.BOS]] * stories, config)
    ids_BT = np.asarray([[stories260k.BOS, *row] for row in drawn], np.int32)

    @jax.jit
    def loss(params):
        logits = model.apply({"params": params}, {"decoder_input_tokens": ids_BT[:, :-1]})
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids_BT[:, 1:]).mean()

    return {kind: float(loss(load_base_model(folder, quantization=kind).params)) for kind in KINDS}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_stories260k.write(folder)
        results = losses(folder)
    for kind, value in results.items():
        print(f"{kind:6} {value:.4f} {value - results['none']:+.4f}")


if __name__ == "__main__":
    main()
