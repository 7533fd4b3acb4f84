"""LoRA against its equation in plain numpy, y = x W0 + s (x A) B, and what it promises besides."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaptedDense, AdapterContext, LoRAConfig
from tests.tiny import draw, shapes_of

B, T, D, F = 2, 5, 6, 4


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, context, rngs=None):
    return module.apply({"params": params}, x, context, rngs=rngs)


def init(config, x, features=F, **options):
    """A projection, its parameters with a B of zero as at the start, and with all of them drawn."""
    module = AdaptedDense(features=features, adapter=config, **options)
    moved = draw(shapes_of(module, x, AdapterContext()), scale=1.0)
    fresh = dict(moved)
    zero_b = np.zeros_like(moved["adapter"]["lora_b"])
    fresh["adapter"] = moved["adapter"] | {"lora_b": zero_b}
    return module, fresh, moved


def reference(x, params, scale, mask=None):
    """Forward in float64, token by token; `mask` multiplies the input of the low-rank pair."""
    w, a, b = (
        np.asarray(v, np.float64)
        for v in (params["kernel"], params["adapter"]["lora_a"], params["adapter"]["lora_b"])
    )
    y = np.zeros((*x.shape[:2], w.shape[1]))
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            token = np.asarray(x[i, t], np.float64)
            dropped = token if mask is None else token * mask[i, t]
            y[i, t] = token @ w + scale * ((dropped @ a) @ b)
    return y


@settings(max_examples=5, deadline=None)
@given(rank=st.integers(1, 8), alpha=st.sampled_from([0.1, 1.0, 32.0]), seed=st.integers(0, 1000))
def test_output_is_the_equation(rank, alpha, seed):
    x = np.random.default_rng(seed).normal(size=(1, 3, D)).astype(np.float32)
    module, _, params = init(LoRAConfig(rank=rank, alpha=alpha), x)
    y = apply(module, params, x, AdapterContext())
    expected = reference(x, params, alpha / rank)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_gradients_are_those_derived_by_hand(x):
    config = LoRAConfig(rank=3, alpha=5.0)
    module, _, params = init(config, x)
    cotangent = np.random.default_rng(3).normal(size=(B, T, F)).astype(np.float32)

    def loss(params, x):
        return jnp.sum(apply(module, params, x, AdapterContext()) * cotangent)

    grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    rows, upstream = (
        x.reshape(-1, D).astype(np.float64),
        cotangent.reshape(-1, F).astype(np.float64),
    )
    w, a, b = (
        np.asarray(v, np.float64)
        for v in (params["kernel"], params["adapter"]["lora_a"], params["adapter"]["lora_b"])
    )
    s = 5.0 / 3
    np.testing.assert_allclose(
        grads["adapter"]["lora_a"], s * rows.T @ (upstream @ b.T), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        grads["adapter"]["lora_b"], s * (rows @ a).T @ upstream, rtol=1e-4, atol=1e-4
    )
    expected_x = (upstream @ (w + s * a @ b).T).reshape(x.shape)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapter_leaves_the_output_bitwise_unchanged(x, dtype):
    module, fresh, _ = init(LoRAConfig(), x, dtype=dtype)
    plain = AdaptedDense(features=F, dtype=dtype)
    frozen = {"kernel": fresh["kernel"]}
    adapted = apply(module, fresh, x, AdapterContext())
    np.testing.assert_array_equal(adapted, apply(plain, frozen, x, AdapterContext()))


def test_initialisation_is_uniform_in_a_and_zero_in_b():
    module = AdaptedDense(features=F, adapter=LoRAConfig(rank=50))
    x = jnp.ones((1, 1, 400))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x, AdapterContext())["params"])
    a = np.asarray(params["adapter"]["lora_a"])
    bound = 400**-0.5
    assert a.shape == (400, 50)
    assert np.abs(a).max() <= bound
    # U(-b, b) has the standard deviation b / sqrt(3); 20000 draws give it to about 1%.
    np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.03)
    assert abs(a.mean()) < 0.01 * bound * 3
    assert not np.any(params["adapter"]["lora_b"])


def test_dropout_acts_in_training_only_on_the_pair_alone(x):
    rate = 0.5
    config = LoRAConfig(rank=2, dropout_rate=rate)
    module, fresh, params = init(config, x)
    rngs = {"dropout": jax.random.key(5)}
    evaluated = apply(module, params, x, AdapterContext(), rngs)
    np.testing.assert_allclose(evaluated, reference(x, params, config.scale), rtol=1e-4, atol=1e-5)

    # With B = 0 the frozen product shows: dropout does not touch it.
    training = AdapterContext(deterministic=False)
    np.testing.assert_array_equal(
        apply(module, fresh, x, training, rngs),
        apply(module, fresh, x, AdapterContext()),
    )
    # The mask is read off an adapter whose product shows its input: A selects feature by feature.
    wide = LoRAConfig(rank=D, alpha=float(D), dropout_rate=rate)
    probe = AdaptedDense(features=D, adapter=wide)
    eye = {"kernel": jnp.zeros((D, D)), "adapter": {"lora_a": jnp.eye(D), "lora_b": jnp.eye(D)}}
    shown = apply(probe, eye, jnp.ones((200, T, D)), training, rngs)
    values, counts = np.unique(np.asarray(shown), return_counts=True)
    np.testing.assert_allclose(values, [0.0, 1 / (1 - rate)])
    np.testing.assert_allclose(counts[0] / counts.sum(), rate, atol=0.03)

    same_key = np.asarray(apply(probe, eye, jnp.ones(x.shape), training, rngs))
    module = AdaptedDense(features=D, adapter=LoRAConfig(rank=D, dropout_rate=rate))
    _, _, moved = init(module.adapter, x, features=D)
    dropped = apply(module, moved, x, training, rngs)
    expected = reference(x, moved, module.adapter.scale, mask=same_key)
    np.testing.assert_allclose(dropped, expected, rtol=1e-4, atol=1e-4)


def test_merged_kernel_computes_the_same(x):
    config = LoRAConfig(rank=3)
    module, _, params = init(config, x)
    merged = config.merge(params["adapter"], params["kernel"])
    y = apply(module, params, x, AdapterContext())
    plain = apply(AdaptedDense(features=F), {"kernel": merged}, x, AdapterContext())
    np.testing.assert_allclose(plain, y, rtol=1e-5, atol=1e-5)
    assert merged.dtype == params["kernel"].dtype


def test_merge_of_stacked_layers_through_vmap(x):
    config = LoRAConfig(rank=3)
    layers = [init(config, x + i)[2] for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    merged = jax.vmap(config.merge)(stacked["adapter"], stacked["kernel"])
    for layer, params in enumerate(layers):
        expected = config.merge(params["adapter"], params["kernel"])
        np.testing.assert_allclose(merged[layer], expected, rtol=1e-6, atol=1e-6)


def test_merge_sums_in_float32_and_keeps_the_kernels_type():
    config = LoRAConfig(rank=1, alpha=1.0)
    kernel = jnp.full((2, 2), 1.0, jnp.bfloat16)
    params = {"lora_a": jnp.full((2, 1), 0.5), "lora_b": jnp.full((1, 2), 0.25)}
    merged = config.merge(params, kernel)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.astype(jnp.float32), 1.125)


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(1, 3, 5), (4, 8, 2)])
def test_counts_are_those_of_the_real_tree_and_of_the_hand(rank, d_in, d_out):
    config = LoRAConfig(rank=rank)
    _, params, _ = init(config, jnp.ones((1, 1, d_in)), features=d_out)
    counted = sum(leaf.size for leaf in jax.tree.leaves(params["adapter"]))
    assert config.count_parameters(d_in, d_out) == counted
    flops = config.flops_per_token(d_in, d_out)
    # A product (n,) x (n, m) takes n * m multiplications and as many additions.
    assert flops.total == 2 * (d_in * rank + rank * d_out)
    assert flops.router == 0
