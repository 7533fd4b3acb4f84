"""AdaMix against its equation in plain numpy: one random pair in training, the averages outside it; how pairs are drawn."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaMixConfig, AdaptedDense, AdapterContext, SecondPass
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.train_state import merge_params, split_params
from sira_jax.training.train_step import step_rngs
from tests.tiny import decoder_config, decoder_params, draw, make_batch, shapes_of

B, T, D, F = 2, 3, 6, 4
TRAINING = AdapterContext(deterministic=False)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, context, rngs=None):
    return module.apply({"params": params}, x, context, rngs=rngs)


def build(config, seed=0, **options):
    """A projection, its drawn parameters, and an input."""
    x = np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)
    module = AdaptedDense(features=F, adapter=config, **options)
    return module, draw(shapes_of(module, x, AdapterContext()), seed, 1.0), x


def pair_output(x, params, scale, a, b):
    """x W0 + s (x A) B in float64, token by token."""
    w = np.asarray(params["kernel"], np.float64)
    y = np.zeros((*x.shape[:2], w.shape[1]))
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            token = np.asarray(x[i, t], np.float64)
            y[i, t] = token @ w + scale * ((token @ a) @ b)
    return y


def experts(params, config):
    """Lists of the experts' A and B in float64; one B where it is shared."""
    adapter = params["adapter"]
    all_a = [np.asarray(a, np.float64) for a in adapter["lora_a"]]
    all_b = adapter["lora_b"][None] if config.share_b else adapter["lora_b"]
    return all_a, [np.asarray(b, np.float64) for b in all_b]


@settings(max_examples=6, deadline=None)
@given(
    num_experts=st.integers(1, 4),
    rank=st.integers(1, 3),
    share_b=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_evaluation_takes_the_mean_a_and_the_mean_b(num_experts, rank, share_b, seed):
    config = AdaMixConfig(num_experts=num_experts, rank=rank, alpha=3.0, share_b=share_b)
    module, params, x = build(config, seed)
    all_a, all_b = experts(params, config)
    expected = pair_output(x, params, 3.0 / rank, sum(all_a) / len(all_a), sum(all_b) / len(all_b))
    y = apply(module, params, x, AdapterContext())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    merged = config.merge(params["adapter"], params["kernel"])
    plain = apply(AdaptedDense(features=F), {"kernel": merged}, x, AdapterContext())
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("share_b", [True, False])
def test_training_takes_one_pair_for_the_whole_batch(share_b):
    config = AdaMixConfig(num_experts=3, rank=2, share_b=share_b)
    module, params, x = build(config)
    all_a, all_b = experts(params, config)
    outputs = {
        (i, j): pair_output(x, params, config.scale, a, b)
        for i, a in enumerate(all_a)
        for j, b in enumerate(all_b)
    }
    seen = set()
    for seed in range(12):
        y = apply(module, params, x, TRAINING, {"expert_choice": jax.random.key(seed)})
        close = [pair for pair, out in outputs.items() if np.allclose(y, out, 1e-4, 1e-4)]
        assert len(close) == 1
        seen.add(close[0])
    assert len({i for i, _ in seen}) == 3
    # A and B do not go together.
    assert share_b or any(i != j for i, j in seen)


def test_gradients_are_those_derived_by_hand_of_the_chosen_pair_alone():
    config = AdaMixConfig(num_experts=3, rank=2, alpha=5.0, share_b=False)
    module, params, x = build(config)
    cotangent = np.random.default_rng(3).normal(size=(B, T, F)).astype(np.float32)
    rngs = {"expert_choice": jax.random.key(4)}

    def loss(params, x):
        return jnp.sum(apply(module, params, x, TRAINING, rngs) * cotangent)

    grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    grad_a, grad_b = (np.asarray(grads["adapter"][name]) for name in ("lora_a", "lora_b"))
    (i,), (j,) = (np.flatnonzero(np.abs(g).max(axis=(1, 2))) for g in (grad_a, grad_b))
    all_a, all_b = experts(params, config)
    a, b, scale = all_a[i], all_b[j], 5.0 / 2
    rows = x.reshape(-1, D).astype(np.float64)
    upstream = cotangent.reshape(-1, F).astype(np.float64)
    w = np.asarray(params["kernel"], np.float64)
    np.testing.assert_allclose(grad_a[i], scale * rows.T @ (upstream @ b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_b[j], scale * (rows @ a).T @ upstream, rtol=1e-4, atol=1e-4)
    expected_x = (upstream @ (w + scale * a @ b).T).reshape(x.shape)
    np.testing.assert_allclose(grad_x, expected_x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share_b", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_nothing_in_training_either(share_b, dtype):
    config = AdaMixConfig(rank=2, share_b=share_b)
    module, params, x = build(config, dtype=dtype)
    fresh = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, AdapterContext())["params"])
    plain = apply(AdaptedDense(features=F, dtype=dtype), {"kernel": params["kernel"]}, x, TRAINING)
    adapted = apply(
        module,
        {"kernel": params["kernel"], "adapter": fresh["adapter"]},
        x,
        TRAINING,
        {"expert_choice": jax.random.key(1)},
    )
    np.testing.assert_array_equal(adapted, plain)
    # The experts start as one LoRA and part in training.
    a = np.asarray(fresh["adapter"]["lora_a"])
    np.testing.assert_array_equal(a, np.broadcast_to(a[:1], (4, D, 2)))
    assert 0 < np.abs(a).max() <= D**-0.5
    assert len(np.unique(a[0])) == a[0].size
    assert not np.any(fresh["adapter"]["lora_b"])


LAYERS, STEPS, EXPERTS = 3, 300, 3


@pytest.fixture(scope="module")
def choices():
    """Chosen experts (passes 2, STEPS, variables): layer by layer, of q's A and B and down's A and B."""
    config = AdaMixConfig(num_experts=EXPERTS, rank=1, share_b=False, targets=("q", "down"))
    model = Decoder(decoder_config(num_layers=LAYERS), config)
    adapter, frozen = split_params(decoder_params(model))
    batch = make_batch([(4,)], 4)

    def chosen(step, second_pass):
        def total(adapter):
            return jnp.sum(
                model.apply(
                    {"params": merge_params(adapter, frozen)},
                    batch,
                    deterministic=False,
                    rngs=step_rngs(0, step, 0, second_pass),
                    method="features",
                )
                * jnp.arange(8.0)
            )

        layers = jax.grad(total)(adapter)["layers"]
        q, down = layers["attention"]["q"]["adapter"], layers["mlp"]["down"]["adapter"]
        leaves = [q["lora_a"], q["lora_b"], down["lora_a"], down["lora_b"]]
        return jnp.stack([jnp.any(leaf != 0, axis=(2, 3)) for leaf in leaves], axis=1)

    got = [
        jax.jit(lambda steps, second=second: jax.lax.map(lambda step: chosen(step, second), steps))(
            jnp.arange(STEPS)
        )
        for second in (False, True)
    ]
    used = np.stack(got).reshape(2, STEPS, LAYERS * 4, EXPERTS)
    # Exactly one expert of each A and B has a gradient.
    np.testing.assert_array_equal(used.sum(axis=-1), 1)
    return used.argmax(axis=-1)


def chi_squared(first, second):
    """Statistic of the table of two draws against equal probabilities of all pairs, 8 degrees of freedom."""
    table = np.zeros((EXPERTS, EXPERTS))
    np.add.at(table, (first, second), 1)
    expected = len(first) / EXPERTS**2
    return ((table - expected) ** 2 / expected).sum()


# Chi-squared with 8 degrees of freedom is above it once in 10^5; equal draws would give 2 STEPS or more.
LIMIT = 37.3


def test_choices_are_uniform_and_independent_between_layers_modules_and_factors(choices):
    for first in range(LAYERS * 4):
        for second in range(first + 1, LAYERS * 4):
            statistic = chi_squared(choices[0, :, first], choices[0, :, second])
            assert statistic < LIMIT, (first, second)


def test_choices_are_independent_between_steps_and_the_two_passes(choices):
    for place in range(LAYERS * 4):
        assert chi_squared(choices[0, :-1, place], choices[0, 1:, place]) < LIMIT
        assert chi_squared(choices[0, :, place], choices[1, :, place]) < LIMIT


def test_average_of_stacked_layers():
    config = AdaMixConfig(num_experts=3, rank=2, share_b=False)
    layers = [build(config, seed)[1] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    merged = config.merge(stacked["adapter"], stacked["kernel"])
    for layer, params in enumerate(layers):
        all_a, all_b = experts(params, config)
        delta = config.scale * (sum(all_a) / 3) @ (sum(all_b) / 3)
        np.testing.assert_allclose(merged[layer], params["kernel"] + delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_b", [True, False])
def test_counts_are_those_of_the_real_tree_and_of_the_hand(share_b):
    config = AdaMixConfig(num_experts=3, rank=2, share_b=share_b)
    _, params, _ = build(config)
    counted = sum(leaf.size for leaf in jax.tree.leaves(params["adapter"]))
    assert config.count_parameters(D, F) == counted
    assert config.active_parameters(D, F) == 2 * (D + F)
    assert config.trained_rank == 6
    flops = config.flops_per_token(D, F)
    assert (flops.total, flops.router) == (2 * (D * 2 + 2 * F), 0)


def test_second_pass_follows_the_fields():
    assert AdaMixConfig().second_pass == SecondPass(weight=1.0, both_gradients=False)
    both = AdaMixConfig(consistency_gradient="both", consistency_loss_weight=0.5)
    assert both.second_pass == SecondPass(weight=0.5, both_gradients=True)
    assert AdaMixConfig(consistency_loss_weight=0.0).second_pass is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 0),
        ("num_experts", 2.0),
        ("share_b", 1),
        ("consistency_loss_weight", -1.0),
        ("consistency_loss_weight", float("nan")),
        ("consistency_gradient", "second"),
        ("consistency_gradient", None),
    ],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}=.* is not allowed: "):
        AdaMixConfig(**{field: value})


def test_overrides_cannot_change_what_holds_for_the_whole_model():
    AdaMixConfig(overrides={"q": {"num_experts": 2, "share_b": False}})
    for field in ("consistency_loss_weight", "consistency_gradient"):
        with pytest.raises(ConfigError, match=rf"adapter\.overrides\['q'\].*{field}"):
            AdaMixConfig(overrides={"q": {field: getattr(AdaMixConfig(), field)}})
