"""Dynamic-rank DoRA on one projection: its equation, penalty, start and merging. Pruning: test_dynamic_dora_pruning.py."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.adapters import AdaptedDense, AdapterContext, DynamicDoRAConfig, LoRAConfig
from sira_jax.errors import ConfigError
from tests.adapters.mixtures import (
    EVALUATION,
    apply,
    differences,
    drawn,
    exact,
    initialised,
    layer,
    normal,
    run,
)

B, T, D, F = 2, 4, 6, 5


def at(progress):
    return AdapterContext(deterministic=False, progress=jnp.float32(progress))


def reference(params, x, scale, mask=None):
    """Output in float64, token by token and component by component."""
    params, x = exact(params), exact(x)
    adapter = params["adapter"]
    mask = np.ones(x.shape) if mask is None else mask
    y = np.zeros((*x.shape[:2], params["kernel"].shape[1]))
    for i, t in np.ndindex(x.shape[:2]):
        y[i, t] = x[i, t] @ params["kernel"]
        for r, c in enumerate(adapter["component_scale"] * adapter["buffer_mask"]):
            h = (x[i, t] * mask[i, t]) @ adapter["lora_a"][:, r]
            y[i, t] += scale * h * c * adapter["lora_b"][r]
    return y


def penalty(adapter):
    """Mean of the variances of all A_i and B_i, one vector at a time."""
    vectors = [*exact(adapter["lora_a"]).T, *exact(adapter["lora_b"])]
    variances = [np.sum((v - np.sum(v) / len(v)) ** 2) / (len(v) - 1) for v in vectors]
    return sum(variances) / len(variances)


@settings(max_examples=6, deadline=None)
@given(
    rank=st.integers(1, 5),
    factor=st.sampled_from([1.0, 1.5, 2.2]),
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(2, 7)] * 2),
    seed=st.integers(0, 1000),
)
def test_output_is_the_equation(rank, factor, shape, seed):
    *rows, d_in, d_out = shape
    x = normal(*rows, d_in, seed=seed)
    module = layer(DynamicDoRAConfig(rank=rank, alpha=3.0, start_rank_factor=factor), d_out)
    params = drawn(module, x, seed)
    start_rank = params["adapter"]["component_scale"].size
    assert start_rank == math.ceil(Fraction(str(factor)) * rank)
    params["adapter"]["buffer_mask"] = (np.arange(start_rank) != 1).astype(np.float32)
    wanted = reference(params, x, 3.0 / rank)
    got = run(module, params, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_gradients_are_those_of_the_equation_and_of_the_penalty():
    config = DynamicDoRAConfig(rank=2, variance_penalty_weight=0.7)
    x, cotangent = normal(B, T, D), normal(B, T, F, seed=1)
    module = layer(config, F)
    params = drawn(module, x, seed=2)
    mask = np.array([1, 0, 1], np.float32)
    buffers = {"buffer_mask": mask, "buffer_score": np.ones(3, np.float32)}
    trained = {name: params["adapter"][name] for name in ("lora_a", "lora_b", "component_scale")}

    def loss(trained, x):
        y, sown = apply(module, params | {"adapter": trained | buffers}, x, at(0.2))
        return jnp.sum(y * cotangent) + sum(jax.tree.leaves(sown["losses"]))

    def exact_loss(trained, x):
        y = reference(params | {"adapter": trained | buffers}, x, config.scale)
        return np.sum(y * cotangent) + 0.7 * penalty(trained)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x)
    wanted = differences(exact_loss, (trained, x))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3), got, wanted)
    assert got[0]["component_scale"][1] == 0, "a component out of the final mask is not trained"


def test_the_penalty_ends_with_the_pruning_and_is_for_training_alone():
    config = DynamicDoRAConfig(prune_end=0.55, variance_penalty_weight=0.1)
    x = normal(B, T, D)
    module = layer(config, F)
    params = drawn(module, x)

    def sown(context):
        return [float(v) for v in jax.tree.leaves(apply(module, params, x, context)[1]["losses"])]

    wanted = 0.1 * penalty(params["adapter"])
    for step in (0, 54):
        np.testing.assert_allclose(sown(at(step / 100)), [wanted], rtol=1e-5)
    for step in (55, 99):
        assert sown(at(np.float32(step) / 100)) == [0.0]
    for context in (
        EVALUATION,
        AdapterContext(progress=jnp.float32(0)),
        at(0).replace(progress=None),
    ):
        assert "losses" not in apply(module, params, x, context)[1]
    without = layer(DynamicDoRAConfig(variance_penalty_weight=0.0), F)
    assert "losses" not in apply(without, params, x, at(0))[1]


def test_initialisation():
    x = normal(1, 2, 400)
    module = layer(DynamicDoRAConfig(rank=40), 300, dtype="bfloat16")
    params = initialised(module, x)
    adapter = params["adapter"]
    # torch's kaiming_uniform_ with its default slope, as the official code: bound sqrt(6 / fan-in).
    for name, fan_in in (("lora_a", 400), ("lora_b", 60)):
        bound = (6 / fan_in) ** 0.5
        assert bound * 0.98 < np.abs(adapter[name]).max() <= bound
        np.testing.assert_allclose(adapter[name].std(), (2 / fan_in) ** 0.5, rtol=0.03)
    frozen = run(AdaptedDense(features=300, dtype="bfloat16"), {"kernel": params["kernel"]}, x)
    np.testing.assert_array_equal(run(module, params, x, at(0)), frozen)


def test_dropout_acts_on_the_components_in_training():
    rate = 0.25
    config = DynamicDoRAConfig(rank=2, dropout_rate=rate)
    x, rngs = normal(B, T, D), {"dropout": jax.random.key(5)}
    module = layer(config, F)
    params = drawn(module, x)
    # LoRA draws from the same stream in the same place, and between identities it shows its mask.
    probe = layer(LoRAConfig(rank=D, alpha=float(D), dropout_rate=rate), D)
    eye = {"kernel": np.zeros((D, D)), "adapter": {"lora_a": np.eye(D), "lora_b": np.eye(D)}}
    mask = run(probe, eye, np.ones(x.shape, np.float32), at(0), rngs)
    assert 0.0 in mask
    wanted = reference(params, x, config.scale, mask)
    np.testing.assert_allclose(run(module, params, x, at(0), rngs), wanted, rtol=1e-4, atol=1e-4)


def test_it_is_one_lora_and_merges_stacked_or_not():
    config = DynamicDoRAConfig(rank=2, alpha=5.0)
    x = normal(B, T, D)
    layers = [drawn(layer(config, F), x, seed) for seed in range(3)]
    for seed, params in enumerate(layers):
        params["adapter"]["buffer_mask"] = (np.arange(3) != seed).astype(np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    merged = config.merge(stacked["adapter"], stacked["kernel"])
    a_stacked, b_stacked = config.as_lora(stacked["adapter"])
    for index, params in enumerate(layers):
        wanted = reference(params, x, config.scale)
        plain = run(AdaptedDense(features=F), {"kernel": merged[index]}, x)
        np.testing.assert_allclose(plain, wanted, rtol=1e-4, atol=1e-4)
        pair = {"lora_a": a_stacked[index], "lora_b": b_stacked[index]}
        lora = layer(LoRAConfig(rank=3, alpha=config.scale * 3), F)
        got = run(lora, {"kernel": params["kernel"], "adapter": pair}, x)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        assert not np.any(b_stacked[index][index]), "a masked component is out of the pair"


def test_counts_are_those_of_the_hand():
    config = DynamicDoRAConfig(rank=3)
    assert config.start_rank == config.trained_rank == 5
    assert config.count_parameters(8, 2) == 5 * (8 + 2 + 1)
    assert config.flops_per_token(8, 2).total == 5 * (2 * (8 + 2) + 1)
    # 1.1 * 10 is a little over 11 in floating point.
    assert DynamicDoRAConfig(rank=10, start_rank_factor=1.1).start_rank == 11


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"start_rank_factor": 0.9}, "start_rank_factor"),
        ({"start_rank_factor": math.inf}, "start_rank_factor"),
        ({"score_decay": 1.0}, "score_decay"),
        ({"score_decay": -0.1}, "score_decay"),
        ({"prune_start": 0.5, "prune_end": 0.5}, "prune_end"),
        ({"prune_end": 1.1}, "prune_end"),
        ({"prune_start": True}, "prune_start"),
        ({"prune_every": 0}, "prune_every"),
        ({"prune_every": 2.0}, "prune_every"),
        ({"variance_penalty_weight": -1}, "variance_penalty_weight"),
        ({"overrides": (("q", {"prune_every": 7}),)}, r"overrides\['q'\]\.prune_every"),
    ],
)
def test_wrong_values_are_refused(fields, name):
    with pytest.raises(ConfigError, match=rf"adapter\.{name}=.* is not allowed"):
        DynamicDoRAConfig(**fields)
    assert DynamicDoRAConfig(overrides=(("q", {"prune_every": 100}),)).prune_every == 100
