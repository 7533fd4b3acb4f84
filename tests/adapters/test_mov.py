"""MoV against plain loops: l = sum_e p_e l_e, then l * (x W0 + b), or (l * x) W0 + b on the MLP's last projection."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdapterContext, MoVConfig, count_model_parameters
from sira_jax.models import Decoder
from sira_jax.training.train_state import count_trained, init_adapter
from tests.adapters.mixtures import (
    TRAINING,
    apply,
    check_gradients,
    drawn,
    exact,
    initialised,
    layer,
    normal,
    token_gates,
)
from tests.tiny import decoder_config

B, T, D, F = 2, 5, 5, 4


def reference(params, x, valid, config, on_input):
    """Output in float64, one token at a time; an expert that is not selected counts as a vector of ones."""
    params, x = exact(params), exact(x)
    vectors, router = params["adapter"]["vectors"], params["adapter"]["router"]
    bias = params.get("bias", 0.0)
    y = np.zeros((*valid.shape, params["kernel"].shape[1]))
    for i, t in np.ndindex(valid.shape):
        scale = np.ones(vectors.shape[1])
        if valid[i, t]:
            probs, _, selected = token_gates(x[i, t], router, config.num_selected_experts)
            scale = np.zeros(vectors.shape[1])
            for e, prob in enumerate(probs):
                scale += prob * (vectors[e] if selected[e] else 1.0)
        if on_input:
            y[i, t] = (scale * x[i, t]) @ params["kernel"] + bias
        else:
            y[i, t] = scale * (x[i, t] @ params["kernel"] + bias)
    return y


@settings(max_examples=8, deadline=None)
@given(
    experts=st.integers(1, 5),
    k=st.one_of(st.none(), st.integers(1, 5)),
    position=st.sampled_from(["input", "output"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 6)),
    use_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(experts, k, position, shape, use_bias, seed):
    rows, length, d_in, d_out = shape
    k = None if k is None else min(k, experts)
    config = MoVConfig(num_experts=experts, num_selected_experts=k, position=position)
    x = normal(rows, length, d_in, seed=seed)
    valid = np.random.default_rng(seed).random((rows, length)) < 0.8
    module = layer(config, d_out, use_bias=use_bias)
    params = drawn(module, x, seed)
    y, _ = apply(module, params, x, TRAINING.replace(valid_BT=valid))
    expected = reference(params, x, valid, config, position == "input")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("position", ["input", "output"])
@pytest.mark.parametrize("k", [None, 2])
def test_gradients_are_the_loops_differences(position, k):
    config = MoVConfig(
        num_experts=3, num_selected_experts=k, position=position, load_balance_loss_weight=0.5
    )
    x = normal(B, T, D)
    valid = np.ones((B, T), bool)
    valid[0, 3:] = False
    module = layer(config, F, use_bias=True)
    check_gradients(
        module,
        lambda params, x, valid: reference(params, x, valid, config, position == "input"),
        drawn(module, x),
        x,
        valid,
        weight=0.5,
        k=k,
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("attention/k", "output"),
        ("attention/v", "output"),
        ("mlp/up", "output"),
        ("mlp/down", "input"),
        ("mlp/wo", "input"),
        ("", "output"),
    ],
)
def test_auto_scales_the_input_of_the_mlps_last_projection_alone(path, expected):
    config = MoVConfig(targets=".*", num_experts=2)
    assert config.for_projection(path).position == expected
    x = normal(B, T, D)
    # Whether the path is resolved before or in the module.
    for adapter in (config, config.for_projection(path)):
        module = layer(adapter, F, path=path)
        params = drawn(module, x)
        width = D if expected == "input" else F
        assert params["adapter"]["vectors"].shape == (2, width)
        y, _ = apply(module, params, x, AdapterContext())
        valid = np.ones((B, T), bool)
        np.testing.assert_allclose(
            y,
            reference(params, x, valid, adapter, expected == "input"),
            rtol=1e-4,
            atol=1e-4,
        )
    fixed = dataclasses.replace(config, position="input").for_projection(path)
    assert fixed.position == "input"


def test_default_targets_and_counts_of_a_model():
    config = MoVConfig(num_experts=3)
    model = Decoder(decoder_config(), config)
    adapter = init_adapter(model, 0)["layers"]
    assert set(adapter) == {"attention", "mlp"}
    assert set(adapter["attention"]) == {"k", "v"}
    assert set(adapter["mlp"]) == {"down"}
    # The hidden layer is 12 wide, keys and values are 8.
    assert adapter["mlp"]["down"]["adapter"]["vectors"].shape == (2, 3, 12)
    sizes = model.config
    expected = count_model_parameters(config, sizes.stacks, sizes.emb_dim)
    by_hand = 2 * 3 * ((8 + 8) + (8 + 8) + (12 + 12))
    assert count_trained({"layers": adapter}) == expected == by_hand


def test_equal_vectors_scale_whatever_the_router_says():
    """The vectors are mixed with weights that sum to one, so equal ones come through."""
    config = MoVConfig(num_experts=4, position="output")
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)
    vector = normal(F, seed=5)
    params["adapter"]["vectors"] = np.tile(vector, (4, 1))
    y, _ = apply(module, params, x, AdapterContext())
    np.testing.assert_allclose(y, vector * (x @ params["kernel"]), rtol=1e-4, atol=1e-5)


def test_ones_change_nothing_at_all_whatever_the_probabilities_sum_to():
    """Probabilities that miss 1 by a rounding, as thousands of random tokens give them, do not show."""
    experts = 7
    x = normal(40, 50, D, seed=2)
    router = 3 * normal(D, experts, seed=3)
    sums = jnp.sum(jax.nn.softmax(jnp.asarray(x @ router), axis=-1), axis=-1)
    assert np.any(np.asarray(sums) != 1)
    for position in ("input", "output"):
        config = MoVConfig(num_experts=experts, position=position)
        width = D if position == "input" else F
        adapter = {"router": router, "vectors": np.ones((experts, width), np.float32)}
        params = {"kernel": normal(D, F), "adapter": adapter}
        y, _ = apply(layer(config, F), params, x, AdapterContext())
        plain, _ = apply(layer(None, F), {"kernel": params["kernel"]}, x, AdapterContext())
        np.testing.assert_array_equal(y, plain)


def test_factors_are_not_rounded_to_bfloat16():
    """1.0115 would round to 1.0078; multiplied in float32, only the output is rounded, up as often as down."""
    config = MoVConfig(num_experts=2, position="output")
    module = layer(config, 512, dtype="bfloat16")
    adapter = {"router": np.zeros((D, 2)), "vectors": np.full((2, 512), 1.0115, np.float32)}
    params = {"kernel": normal(D, 512), "adapter": adapter}
    x = normal(8, 32, D)
    y = exact(apply(module, params, x, AdapterContext())[0])
    plain = exact(apply(layer(None, 512, dtype="bfloat16"), params, x, AdapterContext())[0])
    ratio = np.sum(y * plain) / np.sum(plain * plain)
    np.testing.assert_allclose(ratio, 1.0115, atol=1e-3)


def test_initialisation():
    x = np.ones((1, 1, 400), np.float32)
    config = MoVConfig(num_experts=8, router_init_std=0.03)
    adapter = initialised(layer(config, 3), x)["adapter"]
    assert set(adapter) == {"router", "vectors"}
    np.testing.assert_allclose(adapter["router"].std(), 0.03, rtol=0.06)
    np.testing.assert_array_equal(adapter["vectors"], np.ones((8, 3)))
    assert MoVConfig().router_init_std == 0.02
