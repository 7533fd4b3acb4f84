"""RAC-LoRA against its equation in plain numpy, y = x (W0 + M) + s (x A) B, and the factor that is drawn and frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaptedDense, AdapterContext, RACLoRAConfig, split_trained
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.train_state import init_adapter
from tests.tiny import decoder_config, draw, shapes_of

B, T, D, F = 2, 3, 6, 4
NAMES = {"right": ("buffer_lora_a", "lora_b"), "left": ("lora_a", "buffer_lora_b")}

sketches = pytest.mark.parametrize("sketch", ["left", "right"])


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x):
    return module.apply({"params": params}, x, AdapterContext())


def build(config, seed=0, **options):
    """A projection, its drawn parameters and an input; the merged sum is drawn too."""
    x = np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)
    module = AdaptedDense(features=F, adapter=config, use_bias=True, **options)
    return module, draw(shapes_of(module, x, AdapterContext()), seed, 1.0), x


def in_float64(params, sketch):
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    names = ("buffer_merged", *NAMES[sketch])
    return kernel, bias, *(np.asarray(params["adapter"][name], np.float64) for name in names)


@settings(max_examples=6, deadline=None)
@given(
    sketch=st.sampled_from(["left", "right"]),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 4.0]),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(sketch, rank, alpha, seed):
    module, params, x = build(RACLoRAConfig(rank=rank, alpha=alpha, sketch=sketch), seed)
    w, bias, m, a, b = in_float64(params, sketch)
    expected = np.zeros((B, T, F))
    for i in range(B):
        for t in range(T):
            token = np.asarray(x[i, t], np.float64)
            expected[i, t] = token @ (w + m) + bias + alpha / rank * ((token @ a) @ b)
    y = apply(module, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    merged = module.adapter.merge(params["adapter"], params["kernel"])
    np.testing.assert_allclose(merged, w + m + alpha / rank * a @ b, rtol=1e-4, atol=1e-5)


@sketches
def test_gradients_are_those_derived_by_hand(sketch):
    config = RACLoRAConfig(rank=2, alpha=3.0, sketch=sketch)
    module, params, x = build(config)
    cotangent = np.random.default_rng(3).normal(size=(B, T, F)).astype(np.float32)
    trained, buffers = split_trained({"adapter": params["adapter"]})
    assert list(trained["adapter"]) == ["lora_b" if sketch == "right" else "lora_a"]

    def loss(trained, x):
        adapter = trained["adapter"] | buffers["adapter"]
        return jnp.sum(apply(module, params | {"adapter": adapter}, x) * cotangent)

    grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x)
    w, _, m, a, b = in_float64(params, sketch)
    rows = x.reshape(-1, D).astype(np.float64)
    upstream = cotangent.reshape(-1, F).astype(np.float64)
    if sketch == "right":
        expected = 1.5 * (rows @ a).T @ upstream
    else:
        expected = 1.5 * rows.T @ (upstream @ b.T)
    (got,) = grads["adapter"].values()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    expected_x = (upstream @ (w + m + 1.5 * a @ b).T).reshape(x.shape)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-4, atol=1e-4)


@sketches
@pytest.mark.parametrize("sketch_init", ["gaussian", "kaiming_uniform"])
def test_drawn_factor_has_the_named_distribution_and_the_other_is_zero(sketch, sketch_init):
    config = RACLoRAConfig(rank=40, sketch=sketch, sketch_init=sketch_init, targets="up")
    model = Decoder(decoder_config(emb_dim=64, mlp_dim=144), config)
    leaves = init_adapter(model, 0)["layers"]["mlp"]["up"]["adapter"]
    drawn = np.asarray(leaves["buffer_lora_a" if sketch == "right" else "buffer_lora_b"])
    assert drawn.shape == ((2, 64, 40) if sketch == "right" else (2, 40, 144))
    long_side = 64 if sketch == "right" else 144
    bound = long_side**-0.5
    deviation = bound if sketch_init == "gaussian" else bound / 3**0.5
    # At least 5120 entries: the deviation is known to 1%, the mean to 1.4% of it.
    np.testing.assert_allclose(drawn.std(), deviation, rtol=0.05)
    assert abs(drawn.mean()) < 0.07 * deviation
    is_bounded = np.abs(drawn).max() <= bound
    assert is_bounded == (sketch_init == "kaiming_uniform")
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    assert not np.any(leaves["lora_b" if sketch == "right" else "lora_a"])
    assert set(leaves) == {"buffer_merged", *NAMES[sketch]}


@sketches
def test_counts_are_of_the_trained_factor(sketch):
    config = RACLoRAConfig(rank=2, sketch=sketch)
    _, params, _ = build(config)
    trained = [v.size for k, v in params["adapter"].items() if not k.startswith("buffer_")]
    assert config.count_parameters(D, F) == sum(trained) == 2 * (F if sketch == "right" else D)
    assert config.flops_per_token(D, F).total == 2 * (D * 2 + 2 * F)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sketch", "both"), ("sketch", None), ("sketch_init", "normal"), ("sketch_init", 1)],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}=.* is not allowed: "):
        RACLoRAConfig(**{field: value})
