"""Weight-decomposed DoRA against plain loops, x m V / ||V||, and what it promises of magnitudes, dropout and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaptedDense, DoRAConfig
from sira_jax.errors import ConfigError
from tests.adapters.mixtures import (
    EVALUATION,
    TRAINING,
    apply,
    differences,
    drawn,
    dropout_mask,
    exact,
    initialised,
    layer,
    normal,
    run,
)

B, T, D, F = 2, 4, 6, 5


def column_norms(kernel):
    """Norm of each column, one by one."""
    return np.array([sum(v * v for v in kernel[:, f]) ** 0.5 for f in range(kernel.shape[1])])


def direction(params, scale):
    adapter = params["adapter"]
    return params["kernel"] + scale * adapter["lora_a"] @ adapter["lora_b"]


def reference(params, x, scale, norms=None, mask=None):
    """Output in float64, token by token and output by output. `norms` stand for ||V||; `mask` is the dropout's."""
    params, x = exact(params), exact(x)
    kernel, adapter = params["kernel"], params["adapter"]
    norms = column_norms(direction(params, scale)) if norms is None else norms
    magnitudes = column_norms(kernel) + adapter["magnitude_delta"]
    mask = np.ones(x.shape) if mask is None else mask
    y = np.zeros((*x.shape[:2], kernel.shape[1]))
    for i, t, f in np.ndindex(y.shape):
        low_rank = ((x[i, t] * mask[i, t]) @ adapter["lora_a"]) @ adapter["lora_b"][:, f]
        y[i, t, f] = (x[i, t] @ kernel[:, f] + scale * low_rank) * magnitudes[f] / norms[f]
    return y + params.get("bias", 0.0)


@settings(max_examples=6, deadline=None)
@given(
    rank=st.integers(1, 5),
    alpha=st.sampled_from([0.1, 2.0, 16.0]),
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(2, 7)] * 2),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(rank, alpha, shape, bias, seed):
    *rows, d_in, d_out = shape
    x = normal(*rows, d_in, seed=seed)
    module = layer(DoRAConfig(rank=rank, alpha=alpha), d_out, use_bias=bias)
    params = drawn(module, x, seed)
    wanted = reference(params, x, alpha / rank)
    got = run(module, params, x)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("norm_gradient", [False, True])
def test_gradients_are_those_of_the_equation(norm_gradient):
    """With ||V|| a constant at its value here, or differentiated with all else."""
    config = DoRAConfig(rank=3, alpha=5.0, norm_gradient=norm_gradient)
    x, cotangent = normal(B, T, D), normal(B, T, F, seed=1)
    module = layer(config, F)
    params = drawn(module, x, seed=2)
    constant = column_norms(direction(exact(params), config.scale))
    norms = None if norm_gradient else constant

    def loss(adapter, x):
        y, _ = apply(module, params | {"adapter": adapter}, x, EVALUATION)
        return jnp.sum(y * cotangent)

    def exact_loss(adapter, x):
        y = reference({"kernel": params["kernel"], "adapter": adapter}, x, config.scale, norms)
        return np.sum(y * cotangent)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(params["adapter"], x)
    wanted = differences(exact_loss, (params["adapter"], x))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3), got, wanted)
    other = DoRAConfig(rank=3, alpha=5.0, norm_gradient=not norm_gradient)
    y = run(layer(other, F), params, x)
    np.testing.assert_array_equal(y, run(module, params, x), "the gradient's rule moves no output")


@pytest.mark.parametrize("context", [EVALUATION, TRAINING], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_fresh_adapter_leaves_every_bit(dtype, context):
    """For kernels of any size, whose norms' rounding differs, and under dropout as well."""
    rngs = {"dropout": jax.random.key(0)}
    for size in (1e-3, 1.0, 700.0):
        x = normal(3, 7, 33)
        module = layer(DoRAConfig(dropout_rate=0.5), 129, use_bias=True, dtype=dtype)
        params = initialised(module, x)
        params["kernel"] = normal(33, 129, seed=5) * size
        params["bias"] = normal(129, seed=6)
        plain = {name: params[name] for name in ("kernel", "bias")}
        frozen = run(AdaptedDense(features=129, use_bias=True, dtype=dtype), plain, x)
        np.testing.assert_array_equal(run(module, params, x, context, rngs), frozen)
        ratio = module.adapter.column_ratio(params["adapter"], params["kernel"])
        np.testing.assert_array_equal(ratio, np.ones(129))


@pytest.mark.parametrize("norm_gradient", [False, True])
def test_a_column_of_zeros_has_finite_gradients(norm_gradient):
    config = DoRAConfig(rank=2, norm_gradient=norm_gradient)
    x = normal(B, T, D)
    module = layer(config, F)
    params = initialised(module, x)
    params["kernel"] = params["kernel"] * (np.arange(F) != 1)

    def loss(adapter):
        return jnp.sum(apply(module, params | {"adapter": adapter}, x, EVALUATION)[0] ** 2)

    np.testing.assert_array_equal(run(module, params, x)[..., 1], 0)
    moved = params["adapter"] | {"lora_b": normal(2, F, seed=3)}
    for adapter in (params["adapter"], moved):
        for grad in jax.tree.leaves(jax.jit(jax.grad(loss))(adapter)):
            assert np.isfinite(grad).all()
    # With a direction and a magnitude the column is the equation's, delta * V / ||V||.
    params["adapter"] = moved | {"magnitude_delta": np.full(F, 0.5, np.float32)}
    wanted = reference(params, x, config.scale)
    np.testing.assert_allclose(run(module, params, x), wanted, rtol=1e-4, atol=1e-5)


def test_dropout_touches_the_low_rank_term_alone():
    rate = 0.5
    config = DoRAConfig(rank=3, dropout_rate=rate)
    x, rngs = normal(B, T, D), {"dropout": jax.random.key(5)}
    module = layer(config, F)
    params = drawn(module, x)
    mask = dropout_mask(x.shape, rate, rngs)
    assert set(np.unique(mask)) == {0.0, 2.0}
    wanted = reference(params, x, config.scale, mask=mask)
    got = run(module, params, x, TRAINING, rngs)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(got - run(module, params, x)).max() > 0.1


def test_the_ratio_is_not_rounded_to_bfloat16():
    """A magnitude 1.2 % larger: bfloat16 steps from 1.0078 to 1.0156, the outputs' mean must not."""
    x = normal(8, 32, 64)
    module = layer(DoRAConfig(), 64, dtype="bfloat16")
    params = initialised(module, x)
    frozen = run(module, params, x).astype(np.float64)
    delta = 0.012 * column_norms(params["kernel"])
    params["adapter"]["magnitude_delta"] = delta.astype(np.float32)
    slope = np.sum(run(module, params, x) * frozen) / np.sum(frozen * frozen)
    np.testing.assert_allclose(slope - 1, 0.012, rtol=0.1)


def test_merged_kernel_computes_the_same_with_columns_of_the_magnitudes():
    config = DoRAConfig(rank=3, alpha=4.0)
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)
    merged = config.merge(params["adapter"], params["kernel"])
    plain = run(AdaptedDense(features=F), {"kernel": merged}, x)
    np.testing.assert_allclose(plain, run(module, params, x), rtol=1e-4, atol=1e-5)
    magnitudes = column_norms(params["kernel"]) + params["adapter"]["magnitude_delta"]
    np.testing.assert_allclose(column_norms(np.asarray(merged)), np.abs(magnitudes), rtol=1e-5)
    half = config.merge(params["adapter"], params["kernel"].astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_stacked_layers_merge_as_single_ones():
    config = DoRAConfig(rank=3)
    layers = [drawn(layer(config, F), normal(B, T, D), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    merged = config.merge(stacked["adapter"], stacked["kernel"])
    for got, params in zip(merged, layers, strict=True):
        wanted = config.merge(params["adapter"], params["kernel"])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_counts_are_those_of_the_hand():
    config = DoRAConfig(rank=4)
    assert config.count_parameters(8, 2) == 4 * (8 + 2) + 2
    assert config.flops_per_token(8, 2).total == 2 * 4 * (8 + 2) + 2


def test_wrong_values_are_refused():
    with pytest.raises(ConfigError, match=r"adapter\.norm_gradient='no'.*True or False"):
        DoRAConfig(norm_gradient="no")
