"""MultiLoRA against plain loops over the branches, y = x W0 + s sum_i (x A_i B_i) * c_i, its start and its merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaptedDense, MultiLoRAConfig
from sira_jax.errors import ConfigError
from tests.adapters.mixtures import (
    EVALUATION,
    apply,
    check_dropout,
    check_one_lora,
    check_stacked_merge,
    differences,
    drawn,
    exact,
    initialised,
    layer,
    normal,
    run,
)

B, T, D, F = 2, 4, 6, 5


def reference(params, x, scale, mask=None):
    """Output in float64, token by token and branch by branch."""
    params, x = exact(params), exact(x)
    adapter = params["adapter"]
    mask = np.ones(x.shape) if mask is None else mask
    y = np.zeros((*x.shape[:2], params["kernel"].shape[1]))
    for i, t in np.ndindex(x.shape[:2]):
        y[i, t] = x[i, t] @ params["kernel"]
        for a, b, c in zip(
            adapter["lora_a"], adapter["lora_b"], adapter["branch_scale"], strict=True
        ):
            y[i, t] += scale * c * (((x[i, t] * mask[i, t]) @ a) @ b)
    return y


@settings(max_examples=6, deadline=None)
@given(
    branches=st.integers(1, 4),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.1, 3.0]),
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 7)] * 2),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(branches, rank, alpha, shape, seed):
    *rows, d_in, d_out = shape
    x = normal(*rows, d_in, seed=seed)
    module = layer(MultiLoRAConfig(num_branches=branches, rank=rank, alpha=alpha), d_out)
    params = drawn(module, x, seed)
    wanted = reference(params, x, alpha / rank)
    got = run(module, params, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_gradients_are_those_of_the_equation():
    config = MultiLoRAConfig(num_branches=3, rank=2)
    x, cotangent = normal(B, T, D), normal(B, T, F, seed=1)
    module = layer(config, F)
    params = drawn(module, x, seed=2)

    def loss(params, x):
        return jnp.sum(apply(module, params, x, EVALUATION)[0] * cotangent)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    wanted = differences(
        lambda params, x: np.sum(reference(params, x, config.scale) * cotangent), (params, x)
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=2e-3), got, wanted)


def test_the_first_gradient_reaches_the_scales_alone():
    x = normal(B, T, D)
    module = layer(MultiLoRAConfig(), F)
    params = initialised(module, x)

    def loss(adapter):
        return jnp.sum(apply(module, params | {"adapter": adapter}, x, EVALUATION)[0] ** 2)

    grads = jax.jit(jax.grad(loss))(params["adapter"])
    assert np.all(np.asarray(grads["branch_scale"]) != 0)
    assert not np.any(grads["lora_a"])
    assert not np.any(grads["lora_b"])


@pytest.mark.parametrize("init_scale", [1.0, 6**0.5])
def test_initialisation_is_uniform_in_a_and_b_and_the_frozen_model_as_a_whole(init_scale):
    x = normal(1, 2, 400)
    config = MultiLoRAConfig(num_branches=3, rank=16, init_scale=init_scale)
    module = layer(config, 300, dtype="bfloat16")
    params = initialised(module, x)
    adapter = params["adapter"]
    for name, fan_in in (("lora_a", 400), ("lora_b", 16)):
        bound = init_scale * fan_in**-0.5
        assert bound * 0.98 < np.abs(adapter[name]).max() <= bound
        # Of U(-b, b), for each branch on its own.
        for branch in adapter[name]:
            np.testing.assert_allclose(branch.std(), bound / 3**0.5, rtol=0.05)
    assert np.abs(adapter["lora_a"][0] - adapter["lora_a"][1]).max() > 0
    assert adapter["branch_scale"].shape == (3, 300)
    frozen = run(AdaptedDense(features=300, dtype="bfloat16"), {"kernel": params["kernel"]}, x)
    np.testing.assert_array_equal(run(module, params, x), frozen)


def test_dropout_acts_on_the_branches_in_training():
    config = MultiLoRAConfig(num_branches=2, rank=3, dropout_rate=0.25)
    check_dropout(config, F, reference, normal(B, T, D))


def test_it_is_one_lora_of_all_branches_and_merges_so():
    config = MultiLoRAConfig(num_branches=3, rank=2, alpha=5.0)
    check_one_lora(config, 6, F, reference, normal(B, T, D))


def test_stacked_layers_merge_as_single_ones():
    check_stacked_merge(MultiLoRAConfig(num_branches=3, rank=2), F, normal(B, T, D))


def test_counts_are_those_of_the_hand():
    config = MultiLoRAConfig(num_branches=3, rank=4)
    assert config.count_parameters(8, 2) == 3 * (4 * (8 + 2) + 2)
    assert config.flops_per_token(8, 2).total == 2 * 3 * 4 * (8 + 2)
    assert config.trained_rank == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_branches", 0), ("num_branches", 1.5), ("num_branches", True), ("init_scale", 0.0)],
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}={value!r} is not allowed"):
        MultiLoRAConfig(**{field: value})
