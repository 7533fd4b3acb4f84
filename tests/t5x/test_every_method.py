"""Every method's training step fits T5X: it goes through with the state's shapes unchanged. Nothing is compiled."""

import jax
import pytest

from sira_jax.adapters import METHODS
from tests.t5x.tiny_t5x import (
    MISSING,
    decoder,
    encoder_decoder,
    example_batches,
    make_partitioner,
    t5x_model,
)

pytestmark = pytest.mark.t5x
pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)

# Routes by the prompt among a decoder block's projections.
DECODER_ONLY = {"milora"}
# A stage of xgblora has two layers.
DEEP = {"decoder": {}, "encoder_decoder": {"num_encoder_layers": 2, "num_decoder_layers": 2}}
CASES = [
    (kind, method)
    for kind in ("decoder", "encoder_decoder")
    for method in METHODS
    if kind == "decoder" or method not in DECODER_ONLY
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_step_keeps_the_states_shapes(kind, method):
    from t5x import utils

    from sira_jax.t5x_integration.trainer import end_step, gradients, trainer

    make, targets = {
        "decoder": (decoder, ("q", "v", "up")),
        "encoder_decoder": (encoder_decoder, ("query", "wo")),
    }[kind]
    model = t5x_model(make(METHODS[method](targets=targets), **DEEP[kind]))
    initializer = utils.TrainStateInitializer(
        model.optimizer_def, model.get_initial_variables, {}, make_partitioner()
    )
    before = initializer.global_train_state_shape

    def step(state, batch):
        grads, metrics = gradients(model, state.params, state.step, batch, 1, None)
        new, _ = trainer.apply_grads(state, grads, metrics, 0.1, None)
        return end_step(model, new, state.step)

    batch = next(example_batches(model.module, 1, packed=True))
    after = jax.eval_shape(step, before, batch)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (before, after)]
    assert shapes[0] == shapes[1]
