"""XGBLoRA against its equation in plain numpy, y = x (W0 + M) + active s (x A) B; the choice of layers; the norm penalty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import (
    AdaptedDense,
    AdapterContext,
    XGBLoRAConfig,
    count_model_parameters,
)
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.train_state import init_adapter
from sira_jax.training.train_step import auxiliary_loss
from tests.tiny import decoder_config, decoder_params, draw, make_batch, shapes_of

B, T, D, F = 2, 3, 6, 4


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x):
    return module.apply({"params": params}, x, AdapterContext())


def build(config, seed=0, active=1.0, **options):
    """A projection, its drawn parameters and an input; the merged sum is drawn too."""
    x = np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)
    module = AdaptedDense(features=F, adapter=config, use_bias=True, **options)
    params = draw(shapes_of(module, x, AdapterContext()), seed, 1.0)
    params["adapter"]["buffer_active"] = np.float32(active)
    return module, params, x


def in_float64(params):
    names = ("buffer_merged", "lora_a", "lora_b")
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    return kernel, bias, *(np.asarray(params["adapter"][name], np.float64) for name in names)


@settings(max_examples=6, deadline=None)
@given(
    rank=st.integers(1, 3),
    alpha=st.sampled_from([0.5, 4.0]),
    active=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(rank, alpha, active, seed):
    module, params, x = build(XGBLoRAConfig(rank=rank, alpha=alpha), seed, active)
    w, bias, m, a, b = in_float64(params)
    expected = np.zeros((B, T, F))
    for i in range(B):
        for t in range(T):
            token = np.asarray(x[i, t], np.float64)
            expected[i, t] = token @ (w + m) + bias + active * alpha / rank * ((token @ a) @ b)
    y = apply(module, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    merged = module.adapter.merge(params["adapter"], params["kernel"])
    np.testing.assert_allclose(merged, w + m + active * alpha / rank * a @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [0.0, 1.0])
def test_gradients_are_those_derived_by_hand(active):
    config = XGBLoRAConfig(rank=2, alpha=3.0)
    module, params, x = build(config, active=active)
    cotangent = np.random.default_rng(3).normal(size=(B, T, F)).astype(np.float32)

    def loss(params, x):
        return jnp.sum(apply(module, params, x) * cotangent)

    grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    w, _, m, a, b = in_float64(params)
    rows = x.reshape(-1, D).astype(np.float64)
    upstream = cotangent.reshape(-1, F).astype(np.float64)
    s = active * 3.0 / 2
    own = grads["adapter"]
    np.testing.assert_allclose(own["lora_a"], s * rows.T @ (upstream @ b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own["lora_b"], s * (rows @ a).T @ upstream, rtol=1e-4, atol=1e-4)
    expected_x = (upstream @ (w + m + s * a @ b).T).reshape(x.shape)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-4, atol=1e-4)


def test_the_sum_is_taken_in_float32_and_then_rounded():
    """In bfloat16, beside a weight of 1, 2^-9 is lost; 2^-8 and a little more is rounded up, unless it was rounded before."""
    module = AdaptedDense(
        features=1, adapter=XGBLoRAConfig(), dtype="bfloat16", param_dtype="bfloat16"
    )
    params = shapes_of(module, jnp.ones((1, 1, 1), jnp.bfloat16), AdapterContext())
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    params["kernel"] = jnp.ones((1, 1), jnp.bfloat16)
    for merged, expected in ((2**-9, 1.0), (2**-8 + 2**-17, 1 + 2**-7)):
        params["adapter"]["buffer_merged"] = jnp.full((1, 1), merged, jnp.float32)
        y = apply(module, params, jnp.ones((1, 1, 1), jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        assert float(y[0, 0, 0]) == expected


def test_stages_choose_exactly_so_many_layers_each_as_often():
    config = XGBLoRAConfig(num_layers_per_stage=2)
    keys = jax.random.split(jax.random.key(0), 3000)
    chosen = np.asarray(jax.jit(jax.vmap(lambda key: config.choose_layers(key, 5)))(keys))
    assert set(np.unique(chosen)) == {0, 1}
    np.testing.assert_array_equal(chosen.sum(axis=1), 2)
    # Any pair of the five layers a tenth of the time: 300 times, give or take 16.
    pairs = chosen.T @ chosen
    off_diagonal = pairs[~np.eye(5, dtype=bool)]
    assert np.abs(off_diagonal - 300).max() < 5 * 16.5
    assert np.all(XGBLoRAConfig(num_layers_per_stage=3).choose_layers(keys[0], 3) == 1)


def test_a_fresh_tree_trains_so_many_layers_with_a_kaiming_a():
    config = XGBLoRAConfig(rank=3, num_layers_per_stage=2)
    model = Decoder(decoder_config(num_layers=4, emb_dim=256), config)
    layers = init_adapter(model, 0)["layers"]
    leaves = layers["attention"]["q"]["adapter"]
    active = np.asarray(leaves["buffer_active"])
    assert sorted(active) == [0, 0, 1, 1]
    bound = 256**-0.5
    for layer in range(4):
        a = np.asarray(leaves["lora_a"][layer])
        if active[layer]:
            assert np.abs(a).max() <= bound
            np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
        else:
            assert not np.any(a)
    assert not np.any(leaves["lora_b"])
    np.testing.assert_array_equal(layers["mlp"]["down"]["adapter"]["buffer_active"], active)


def test_more_layers_than_the_model_has_are_refused():
    config = XGBLoRAConfig(num_layers_per_stage=3)
    with pytest.raises(
        ConfigError, match=r"adapter\.num_layers_per_stage=3 is not allowed: .*2 layers"
    ):
        init_adapter(Decoder(decoder_config(num_layers=2), config), 0)


def test_norm_penalty_is_the_mean_squared_norm_of_the_products():
    config = XGBLoRAConfig(rank=2, alpha=3.0, norm_penalty_weight=0.5, targets=("q", "down"))
    model = Decoder(decoder_config(num_layers=3), config)
    params = decoder_params(model)
    active = np.asarray([1, 0, 1], np.float32)
    places = (("attention", "q"), ("mlp", "down"))
    expected = []
    for module, name in places:
        leaves = params["layers"][module][name]["adapter"]
        leaves["buffer_active"] = active
        for layer in range(3):
            product = np.asarray(leaves["lora_a"][layer], np.float64) @ leaves["lora_b"][layer]
            expected.append(active[layer] * ((1.5 * product) ** 2).sum())

    def penalty(params):
        _, sown = model.apply({"params": params}, make_batch([(4,)], 4), mutable=["losses"])
        return auxiliary_loss(sown["losses"])

    value, grads = jax.jit(jax.value_and_grad(penalty))(params)
    np.testing.assert_allclose(value, 0.5 * np.mean(expected), rtol=1e-5)
    for module, name in places:
        leaves = params["layers"][module][name]["adapter"]
        got = grads["layers"][module][name]["adapter"]["lora_b"]
        for layer in range(3):
            a, b = (np.asarray(leaves[k][layer], np.float64) for k in ("lora_a", "lora_b"))
            by_hand = 0.5 / 6 * active[layer] * 1.5**2 * 2 * a.T @ (a @ b)
            np.testing.assert_allclose(got[layer], by_hand, rtol=1e-4, atol=1e-6)


def test_without_a_penalty_nothing_is_sown():
    module, params, x = build(XGBLoRAConfig())
    _, sown = module.apply({"params": params}, x, AdapterContext(), mutable=["losses"])
    assert not sown


def test_counts_are_of_the_trained_leaves():
    config = XGBLoRAConfig(rank=2)
    _, params, _ = build(config)
    trained = [v.size for k, v in params["adapter"].items() if not k.startswith("buffer_")]
    assert config.count_parameters(D, F) == sum(trained) == 2 * (D + F)
    assert config.flops_per_token(D, F).total == 2 * (D * 2 + 2 * F)
    assert (XGBLoRAConfig().rank, XGBLoRAConfig().scale) == (1, 2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers_per_stage", 0),
        ("num_layers_per_stage", 1.0),
        ("num_layers_per_stage", None),
        ("norm_penalty_weight", -0.1),
        ("norm_penalty_weight", float("inf")),
    ],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}=.* is not allowed: "):
        XGBLoRAConfig(**{field: value})


def test_overrides_cannot_change_the_number_of_layers():
    with pytest.raises(ConfigError, match=r"adapter\.overrides\['q'\].*num_layers_per_stage"):
        XGBLoRAConfig(overrides={"q": {"num_layers_per_stage": 1}})


def test_a_token_uses_the_parameters_of_a_stages_layers():
    sizes = decoder_config(num_layers=5)
    counts = {
        layers: count_model_parameters(
            XGBLoRAConfig(num_layers_per_stage=layers), sizes.stacks, sizes.emb_dim, active=True
        )
        for layers in (1, 2, 9)
    }
    whole = count_model_parameters(XGBLoRAConfig(), sizes.stacks, sizes.emb_dim)
    assert counts == {1: whole // 5, 2: whole // 5 * 2, 9: whole}
