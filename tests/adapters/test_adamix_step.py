"""AdaMix's consistency term in a whole training step: its value in plain numpy, its gradient against a loss written apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import AdaMixConfig, split_trained
from sira_jax.models import Decoder
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import TrainState, merge_params, split_params
from sira_jax.training.train_step import make_train_step, step_rngs
from tests.tiny import decoder_config, decoder_params, make_batch

BATCH = make_batch([(5, 3), (7,), (4, 2, 2), (3,)], 8)
WEIGHT, SEED, STEP = 0.7, 3, 5
FIELDS = {
    "num_experts": 3,
    "rank": 2,
    "share_b": False,
    "dropout_rate": 0.2,
    "targets": ("q", "down"),
    "consistency_loss_weight": WEIGHT,
}
MODEL = Decoder(decoder_config(), AdaMixConfig(**FIELDS))
ADAPTER, FROZEN = split_params(decoder_params(MODEL))


def run_step(gradient, **options):
    """(gradient, metrics) of one step that starts as number STEP, every parameter drawn."""
    config = OptimizerConfig(learning_rate=0.01, clip_norm=None)
    optimizer = make_optimizer(config, 10)
    adapter = AdaMixConfig(**FIELDS, consistency_gradient=gradient)
    step = make_train_step(
        Decoder(MODEL.config, adapter),
        optimizer,
        make_schedule(config, 10),
        seed=SEED,
        num_steps=10,
        **options,
    )
    moments = optimizer.init(split_trained(ADAPTER)[0])
    state = TrainState(step=jnp.int32(STEP), adapter=ADAPTER, optimizer=moments)
    state, metrics = jax.jit(step)(state, FROZEN, BATCH)
    # AdamW's first moment after one step is a tenth of the gradient.
    mu = next(part.mu for part in state.optimizer if hasattr(part, "mu"))
    return jax.tree.map(lambda leaf: np.asarray(leaf) * 10, mu), metrics


def logits(adapter, batch, microbatch, second_pass):
    """One stochastic forward pass with the keys that the step has for it."""
    rngs = step_rngs(SEED, STEP, microbatch, second_pass=second_pass)
    params = {"params": merge_params(adapter, FROZEN)}
    return MODEL.apply(params, batch, deterministic=False, rngs=rngs)


@jax.jit
def losses(first, second, batch):
    """(cross-entropy, consistency term) summed over the target tokens, each divergence written out."""
    p, q = jax.nn.softmax(first), jax.nn.softmax(second)
    forward = jnp.sum(p * jnp.log(p / q), axis=-1)
    backward = jnp.sum(q * jnp.log(q / p), axis=-1)
    targets = batch["decoder_target_tokens"][..., None]
    nats = -jnp.log(jnp.take_along_axis(p, targets, axis=-1)[..., 0])
    weights = batch["decoder_loss_weights"]
    return jnp.sum(weights * nats), jnp.sum(weights * (forward + backward) / 2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def expected_gradient(batch, gradient, parts=1):
    """Of the whole loss, microbatch by microbatch."""
    total = jnp.sum(batch["decoder_loss_weights"])

    def loss(adapter, held):
        value = 0.0
        for index in range(parts):
            rows = slice(index * 4 // parts, (index + 1) * 4 // parts)
            part = {name: x[rows] for name, x in batch.items()}
            first = logits(adapter, part, index, False)
            nats, divergence = losses(first, logits(held, part, index, True), part)
            value += nats
            if gradient == "first":
                # Twice the derivative through the first pass.
                divergence = 2 * divergence
            value += WEIGHT * divergence
        return value / total

    if gradient == "first":
        return jax.grad(loss)(ADAPTER, ADAPTER)
    return jax.grad(lambda adapter: loss(adapter, adapter))(ADAPTER)


def divergence_in_numpy(first, second, weights):
    """Symmetric KL divergence, float64, summed over the positions with a weight."""
    total = 0.0
    for index in np.ndindex(weights.shape):
        if weights[index] == 0:
            continue
        rows = [np.asarray(x[index], np.float64) for x in (first, second)]
        log_p, log_q = (row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in rows)
        forward = (np.exp(log_p) * (log_p - log_q)).sum()
        backward = (np.exp(log_q) * (log_q - log_p)).sum()
        total += weights[index] * (forward + backward) / 2
    return total


@functools.cache
def both_passes(microbatch, start, stop):
    part = {name: x[start:stop] for name, x in BATCH.items()}
    first, second = (
        jax.jit(logits, static_argnums=(2, 3))(ADAPTER, part, microbatch, second)
        for second in (False, True)
    )
    return divergence_in_numpy(first, second, part["decoder_loss_weights"])


@pytest.mark.parametrize(
    ("gradient", "parts", "chunk_size"),
    [
        pytest.param("both", 1, 0, marks=pytest.mark.slow),
        ("both", 1, 3),
        pytest.param("first", 2, 3, marks=pytest.mark.slow),
    ],
)
def test_consistency_term_of_a_step(gradient, parts, chunk_size):
    got, metrics = run_step(gradient, accumulation_steps=parts, loss_chunk_size=chunk_size)
    rows = 4 // parts
    sums = [both_passes(index, index * rows, (index + 1) * rows) for index in range(parts)]
    divergence = sum(sums) / BATCH["decoder_loss_weights"].sum()
    assert divergence > 0.01
    np.testing.assert_allclose(metrics["auxiliary_loss"], WEIGHT * divergence, rtol=1e-4)
    expected = expected_gradient(BATCH, gradient, parts)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest), got, expected
    )


@pytest.mark.slow
def test_gradient_through_the_first_pass_is_unbiased():
    """Averaged over both orders of the two passes, twice the first pass's gradient is the whole one's: by symmetry."""
    keys = [step_rngs(SEED, STEP, 0, second_pass=second) for second in (False, True)]

    def divergence(one, other, order):
        passes = [
            MODEL.apply(
                {"params": merge_params(adapter, FROZEN)}, BATCH, deterministic=False, rngs=rngs
            )
            for adapter, rngs in zip((one, other), order, strict=True)
        ]
        return losses(*passes, BATCH)[1]

    @jax.jit
    def gradients(adapter):
        halves = [
            jax.grad(divergence)(adapter, adapter, order) for order in (keys, list(reversed(keys)))
        ]
        whole = jax.grad(lambda both: divergence(both, both, keys))(adapter)
        return halves, whole

    halves, whole = gradients(ADAPTER)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-3, atol=1e-4 * largest),
        *halves,
        whole,
    )
    # One order alone is another gradient: the tests of the step can tell the two apart.
    differences = jax.tree.map(lambda a, c: np.abs(2 * a - c).max(), halves[0], whole)
    assert max(jax.tree.leaves(differences)) > 0.1 * largest


def test_without_weight_there_is_no_second_pass():
    config = OptimizerConfig(learning_rate=0.01)
    optimizer = make_optimizer(config, 10)
    products = []
    for weight in (0.0, WEIGHT):
        adapter = AdaMixConfig(**FIELDS | {"consistency_loss_weight": weight})
        model = Decoder(decoder_config(scan_layers=False), adapter)
        adapter_params, frozen = split_params(decoder_params(model))
        moments = jax.eval_shape(optimizer.init, adapter_params)
        step = make_train_step(model, optimizer, make_schedule(config, 10), seed=0, num_steps=10)
        state = TrainState(step=jnp.int32(0), adapter=adapter_params, optimizer=moments)
        jaxpr = jax.make_jaxpr(step)(state, frozen, BATCH)
        products.append(str(jaxpr).count("dot_general"))
    # A third pass beside the forward and the backward one.
    assert 1.3 * products[0] < products[1] < 1.7 * products[0]
