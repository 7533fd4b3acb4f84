"""MELoRA against plain loops over the mini LoRAs, its rank, and that it merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaptedDense, LoRAConfig, MELoRAConfig
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.train_state import abstract_params
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
from tests.tiny import decoder_config

B, T, D, F = 2, 4, 6, 9


def reference(params, x, scale, mask=None):
    """Output in float64, token by token and block by block."""
    params, x = exact(params), exact(x)
    a, b = params["adapter"]["lora_a"], params["adapter"]["lora_b"]
    mask = np.ones(x.shape) if mask is None else mask
    width_in, width_out = a.shape[1], b.shape[2]
    y = np.zeros((*x.shape[:2], params["kernel"].shape[1]))
    for i, t in np.ndindex(x.shape[:2]):
        y[i, t] = x[i, t] @ params["kernel"]
        for n in range(len(a)):
            piece = (x[i, t] * mask[i, t])[n * width_in : (n + 1) * width_in]
            y[i, t, n * width_out : (n + 1) * width_out] += scale * ((piece @ a[n]) @ b[n])
    return y


@settings(max_examples=6, deadline=None)
@given(
    blocks=st.integers(1, 4),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.1, 3.0]),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(blocks, rank, alpha, shape, seed):
    *rows, width_in, width_out = shape
    x = normal(*rows, blocks * width_in, seed=seed)
    module = layer(MELoRAConfig(num_blocks=blocks, rank=rank, alpha=alpha), blocks * width_out)
    params = drawn(module, x, seed)
    wanted = reference(params, x, alpha / rank)
    got = run(module, params, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_gradients_are_those_of_the_equation():
    config = MELoRAConfig(num_blocks=3, rank=2)
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


def test_the_rank_is_n_times_a_loras_at_the_same_parameters():
    """The method's point: n blocks of rank R have rank n R together and cost R (D + F)."""
    config = MELoRAConfig(num_blocks=4, rank=3)
    d_in, d_out = 24, 32
    params = drawn(layer(config, d_out), normal(1, 2, d_in))
    delta = np.asarray(config.merge(params["adapter"], np.zeros((d_in, d_out), np.float32)))
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    assert np.sum(values > 1e-4 * values[0]) == 12
    trained = sum(leaf.size for leaf in jax.tree.leaves(params["adapter"]))
    assert trained == LoRAConfig(rank=3).count_parameters(d_in, d_out)
    assert trained == config.count_parameters(d_in, d_out) == 3 * (24 + 32)
    assert config.flops_per_token(d_in, d_out).total == 2 * 3 * (24 + 32)
    for row, column in np.ndindex(4, 4):
        block = delta[6 * row : 6 * (row + 1), 8 * column : 8 * (column + 1)]
        assert np.any(block) == (row == column)


def test_each_mini_lora_starts_as_a_lora_of_its_own_width():
    config = MELoRAConfig(num_blocks=4, rank=50)
    x = normal(1, 2, 400)
    module = layer(config, 40, dtype="bfloat16")
    params = initialised(module, x)
    a, bound = params["adapter"]["lora_a"], 100**-0.5
    assert a.shape == (4, 100, 50)
    assert bound * 0.98 < np.abs(a).max() <= bound
    for block in a:
        np.testing.assert_allclose(block.std(), bound / 3**0.5, rtol=0.03)
    frozen = run(AdaptedDense(features=40, dtype="bfloat16"), {"kernel": params["kernel"]}, x)
    np.testing.assert_array_equal(run(module, params, x), frozen)


def test_dropout_acts_on_the_mini_loras_in_training():
    config = MELoRAConfig(num_blocks=3, rank=2, dropout_rate=0.25)
    check_dropout(config, F, reference, normal(B, T, D))


def test_it_is_one_lora_of_rank_nr_and_merges_so():
    config = MELoRAConfig(num_blocks=3, rank=2, alpha=5.0)
    check_one_lora(config, 6, F, reference, normal(B, T, D))


def test_stacked_layers_merge_as_single_ones():
    check_stacked_merge(MELoRAConfig(num_blocks=3, rank=2), F, normal(B, T, D))


@pytest.mark.parametrize("blocks", [0, -2, 1.5, True])
def test_a_wrong_number_of_blocks_is_refused(blocks):
    with pytest.raises(ConfigError, match=rf"adapter\.num_blocks={blocks} is not allowed: a whole"):
        MELoRAConfig(num_blocks=blocks)


@pytest.mark.parametrize(("target", "sizes"), [("down", "mlp/down, 12 x 8"), ("q", "q, 8 x 16")])
def test_blocks_that_do_not_divide_a_projection_are_refused_when_the_model_is_made(target, sizes):
    """Either size is enough: 3 divides the 12 of down but not its 8."""
    model = Decoder(decoder_config(), MELoRAConfig(num_blocks=3, targets=(target,)))
    with pytest.raises(ConfigError, match=rf"adapter\.num_blocks=3 .*divisor.*{sizes}"):
        abstract_params(model)
