"""Optimizers against plain numpy steps, and schedules at given steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule

PARAMS = {"a": np.asarray([[0.5, -1.0, 2.0]], np.float32), "b": np.asarray([0.0, 3.0], np.float32)}
GRADS = [
    {"a": np.asarray([[0.1, -0.2, 0.0]], np.float32), "b": np.asarray([1.0, -2.0], np.float32)},
    {"a": np.asarray([[0.3, 0.1, 0.0]], np.float32), "b": np.asarray([-1.0, 0.5], np.float32)},
    {"a": np.asarray([[0.0, 0.4, 0.0]], np.float32), "b": np.asarray([4.0, 0.5], np.float32)},
]


def follow(optimizer, params=PARAMS, grads=GRADS):
    """Parameters after each gradient."""
    state, path = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for one in grads:
        updates, state = step(one, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def clipped(grads, limit):
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
    factor = 1.0 if limit is None or norm < limit else limit / norm
    return {name: g.astype(np.float64) * factor for name, g in grads.items()}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_its_equation(clip_norm, weight_decay):
    """arXiv 1711.05101, algorithm 2, with the decay scaled by the learning rate."""
    config = OptimizerConfig(
        learning_rate=0.01,
        warmup_steps=2,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-6,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )
    path = follow(make_optimizer(config, 10))
    x = {name: value.astype(np.float64) for name, value in PARAMS.items()}
    m = {name: np.zeros_like(value) for name, value in x.items()}
    v = {name: np.zeros_like(value) for name, value in x.items()}
    for step, raw in enumerate(GRADS):
        rate = 0.01 * min(1.0, step / 2)
        for name, g in clipped(raw, clip_norm).items():
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            direction = m_hat / (np.sqrt(v_hat) + 1e-6) + weight_decay * x[name]
            x[name] = x[name] - rate * direction
            np.testing.assert_allclose(path[step][name], x[name], rtol=1e-5, atol=1e-6)


def test_clipping_scales_the_whole_gradient_and_only_if_it_is_too_long():
    long = {"a": np.asarray([3.0, 0.0], np.float32), "b": np.asarray([4.0], np.float32)}
    config = OptimizerConfig(clip_norm=0.5, epsilon=1e3, learning_rate=1.0)
    # So large an epsilon makes AdamW's first update the gradient / epsilon.
    zeros = {name: np.zeros_like(value) for name, value in long.items()}
    (moved,) = follow(make_optimizer(config, 10), zeros, [long])
    np.testing.assert_allclose(moved["a"] * 1e3, [-0.3, 0.0], rtol=1e-3)
    np.testing.assert_allclose(moved["b"] * 1e3, [-0.4], rtol=1e-3)
    short = {name: value / 100 for name, value in long.items()}
    (moved,) = follow(make_optimizer(config, 10), zeros, [short])
    np.testing.assert_allclose(moved["a"] * 1e3, [-0.03, 0.0], rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_both_go_downhill_from_a_b_of_zero(name):
    """LoRA's start: A drawn, B zero. The product is to become a target of rank 1."""
    rng = np.random.default_rng(0)
    target = np.outer(rng.normal(size=6), rng.normal(size=5)).astype(np.float32)
    params = {
        "a": rng.normal(size=(6, 2)).astype(np.float32),
        "b": np.zeros((2, 5), np.float32),
    }
    config = OptimizerConfig(name=name, learning_rate=0.05)
    optimizer = make_optimizer(config, 200)

    def loss(params):
        return jnp.mean(jnp.square(params["a"] @ params["b"] - target))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=200)[1]

    losses = train(params)
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_scaled_by_the_learning_rate(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5)
    params = {"w": np.asarray([2.0, -4.0], np.float32)}
    zero = {"w": np.zeros(2, np.float32)}
    (moved,) = follow(make_optimizer(config, 10), params, [zero])
    np.testing.assert_allclose(moved["w"], params["w"] * (1 - 0.1 * 0.5), rtol=1e-5)


def test_adafactor_holds_a_row_and_a_column_of_a_large_matrix():
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", clip_norm=None), 10)
    state = optimizer.init({"w": jnp.zeros((256, 512))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 256 + 512 + 16


def cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 5: 1.0, 10: 1.0}),
        (
            {"schedule": "constant", "warmup_steps": 4},
            {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 10: 1.0},
        ),
        (
            {"schedule": "linear", "end_factor": 0.2},
            {0: 1.0, 5: 0.6, 10: 0.2, 11: 0.2},
        ),
        (
            {"schedule": "linear", "warmup_steps": 2},
            {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0},
        ),
        (
            {"schedule": "cosine", "end_factor": 0.1},
            {0: 1.0, 3: 0.1 + 0.9 * cosine(0.3), 5: 0.55, 10: 0.1, 20: 0.1},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 6},
            {3: 0.5, 6: 1.0, 7: cosine(0.25), 8: 0.5, 10: 0.0},
        ),
        (
            {"schedule": "rsqrt", "warmup_steps": 4},
            {0: 0.0, 2: 0.5, 4: 1.0, 9: 2 / 3, 16: 0.5, 100: 0.2},
        ),
    ],
)
def test_schedules(fields, expected):
    """Of 11 steps, so that the last has index 10; the peak is 0.3."""
    schedule = make_schedule(OptimizerConfig(learning_rate=0.3, **fields), 11)
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), 0.3 * share, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), 0.3 * share, atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "rsqrt"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 1), (5, 5), (5, 4)])
def test_schedules_are_finite_at_their_borders(schedule, num_steps, warmup_steps):
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup_steps)
    rates = [float(make_schedule(config, num_steps)(step)) for step in range(num_steps + 1)]
    assert all(0 <= rate <= config.learning_rate * (1 + 1e-6) for rate in rates)
