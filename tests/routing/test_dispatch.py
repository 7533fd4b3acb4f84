import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.errors import ConfigError
from sira_jax.routing import RoutingConfig, apply_experts, choose_algorithm, mix_experts
from tests.routing.helpers import (
    ALGORITHMS,
    assert_close,
    assert_matches_reference,
    layer_and_gradients,
    make_layer,
    quick_jit,
    quick_route,
)
from tests.routing.reference import reference_layer

# (config fields, groups, tokens, d_in, d_out, rank, share of valid tokens)
CASES = {
    "plain": ({"num_experts": 8, "num_selected_experts": 3}, 2, 24, 12, 10, 4, 0.9),
    "odd_sizes": ({"num_experts": 5, "num_selected_experts": 2}, 3, 13, 7, 11, 3, 0.8),
    "one_expert": ({"num_experts": 1, "num_selected_experts": 1}, 2, 9, 6, 5, 2, 0.8),
    "all_experts": (
        {"num_experts": 4, "num_selected_experts": 4, "capacity_factor": 0.6, "min_capacity": 1},
        2, 11, 6, 5, 2, 0.9,
    ),
    "one_token_groups": ({"num_experts": 4, "num_selected_experts": 2}, 7, 1, 5, 3, 2, 0.7),
    "tiny_capacity": (
        {"num_experts": 6, "num_selected_experts": 3, "capacity_factor": 0.01, "min_capacity": 0},
        2, 17, 6, 7, 2, 0.9,
    ),
    "renormalized": (
        {"num_experts": 7, "num_selected_experts": 3, "renormalize": True, "capacity_factor": 2.1,
         "min_capacity": 1, "capacity_counts_k": False},
        2, 16, 6, 5, 3, 0.8,
    ),
    "no_capacity_limit": (
        {"num_experts": 3, "num_selected_experts": 3, "renormalize": True,
         "capacity_factor": None}, 1, 6, 4, 3, 2, 1.0,
    ),
    "all_padding": ({"num_experts": 4, "num_selected_experts": 2}, 2, 6, 5, 4, 2, 0.0),
}  # fmt: skip


def build(case, seed=0):
    fields, groups, tokens, d_in, d_out, rank, share = CASES[case]
    config = RoutingConfig(**fields)
    arrays, valid = make_layer(
        config, groups, tokens, d_in, d_out, rank, seed=seed, valid_share=share
    )
    return config, arrays, valid


def loops(arrays, valid, config, **options):
    names = ("x", "router", "lora_a", "lora_b")
    inputs = [arrays[name] for name in names[:1]] + [valid] + [arrays[name] for name in names[1:]]
    options = {"scale": 1.5, "deterministic": False, "cotangent": arrays["cotangent"]} | options
    return reference_layer(*inputs, config, **options)


# einsum compiles longest: the fast suite has two of its cases here, and random ones below.
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        pytest.param(case, algorithm, marks=[pytest.mark.slow])
        if algorithm == "einsum" and case not in ("plain", "tiny_capacity")
        else (case, algorithm)
        for case in CASES
        for algorithm in ALGORITHMS
    ],
)
def test_values_drops_and_gradients_match_the_loops(case, algorithm):
    config, arrays, valid = build(case)
    reference = loops(arrays, valid, config, load_balance_weight=0.3, z_weight=0.2)
    config = dataclasses.replace(config, dispatch=algorithm)
    assert_matches_reference(arrays, valid, config, reference, weights=(0.3, 0.2))


def test_cases_do_drop_tokens():
    dropping = {"all_experts", "tiny_capacity", "renormalized"}
    for case in CASES:
        config, arrays, valid = build(case)
        reference = loops(arrays, valid, config)
        if case in dropping:
            assert 0 < reference.kept.sum() < reference.selected.sum(), case


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_layers_match_the_loops(data):
    experts = data.draw(st.integers(1, 9))
    config = RoutingConfig(
        num_experts=experts,
        num_selected_experts=data.draw(st.integers(1, experts)),
        capacity_factor=data.draw(st.sampled_from([None, 0.1, 0.5, 1.0, 1.25, 3.0])),
        min_capacity=data.draw(st.integers(0, 4)),
        renormalize=data.draw(st.booleans()),
    )
    sizes = [data.draw(st.integers(1, high)) for high in (3, 14, 6, 6, 3)]
    arrays, valid = make_layer(config, *sizes, seed=data.draw(st.integers(0, 99)))
    reference = loops(arrays, valid, config)
    algorithm = data.draw(st.sampled_from([*ALGORITHMS, "auto"]))
    config = dataclasses.replace(config, dispatch=algorithm)
    assert_matches_reference(arrays, valid, config, reference)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_tokens_on_one_expert(algorithm):
    config = RoutingConfig(
        num_experts=4, num_selected_experts=2, capacity_factor=0.5, min_capacity=1,
        dispatch=algorithm,
    )  # fmt: skip
    arrays, valid = make_layer(config, 2, 16, 5, 4, 2, valid_share=1.0)
    arrays["x"][..., 0] = 1.0
    arrays["router"][0] = [0.0, 0.0, 9.0, 0.0]
    reference = loops(arrays, valid, config)
    assert (reference.selected[..., 2]).all()
    assert reference.kept[..., 2].sum(axis=1).tolist() == [4, 4]
    assert_matches_reference(arrays, valid, config, reference)


@pytest.mark.parametrize(
    ("algorithm", "position"),
    [
        ("einsum", "before_topk"),
        ("masked", "before_topk"),
        ("masked", "after_topk"),
        ("ragged", "after_topk"),
    ],
)
def test_expert_dropout_matches_the_loops(algorithm, position):
    rate, rng = 0.4, jax.random.key(5)
    config = RoutingConfig(
        num_experts=5, num_selected_experts=3, capacity_factor=0.6, min_capacity=1,
        expert_dropout_rate=rate, expert_dropout_position=position, dispatch=algorithm,
        renormalize=True,
    )  # fmt: skip
    arrays, valid = make_layer(config, 2, 14, 6, 5, 2)
    # With every expert selected and no limit the gates show which ones the same key drops.
    shown = dataclasses.replace(
        config, num_selected_experts=5, capacity_factor=None, renormalize=False
    )
    logits = jnp.zeros((2, 14, 5))
    gates = quick_route(
        logits, np.ones((2, 14), bool), shown, deterministic=False, rng=rng
    ).gates_GSE
    mask = np.where(np.asarray(gates) > 0, 1 / (1 - rate), 0.0)
    assert 0.4 < (mask > 0).mean() < 0.8
    reference = loops(arrays, valid, config, dropout_mask=mask)
    assert_matches_reference(arrays, valid, config, reference, rng=rng)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_activations(algorithm):
    config = RoutingConfig(
        num_experts=6, num_selected_experts=2, capacity_factor=0.8, dispatch=algorithm
    )
    arrays, valid = make_layer(config, 2, 15, 16, 12, 4)
    # Rounded first, so that the loops and the router, which is float32, read the same numbers.
    x_bf16 = jnp.asarray(arrays["x"], jnp.bfloat16)
    arrays["x"] = np.asarray(x_bf16, np.float32)
    reference = loops(arrays, valid, config)
    arrays["x"] = x_bf16
    delta, routing, gradients = layer_and_gradients(arrays, valid, config)
    assert delta.dtype == jnp.bfloat16
    assert routing.probs_GSE.dtype == routing.gates_GSE.dtype == jnp.float32
    np.testing.assert_array_equal(routing.kept_GSE, reference.kept)
    assert_close(routing.probs_GSE, reference.probs, 1e-6)
    assert_close(delta, reference.delta, 2e-2)
    assert gradients["x"].dtype == jnp.bfloat16
    assert_close(gradients["x"], reference.grad_x, 2e-2)
    for name, desired in (
        ("router", reference.grad_router),
        ("lora_a", reference.grad_a),
        ("lora_b", reference.grad_b),
    ):
        assert gradients[name].dtype == jnp.float32
        assert_close(gradients[name], desired, 2e-2, name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_has_no_effect(algorithm):
    config, arrays, _ = build("plain")
    config = dataclasses.replace(config, dispatch=algorithm)
    valid = np.random.default_rng(0).random((2, 24)) < 0.6
    results = []
    for content in (0.0, -7.0, 1e30, 3e38):
        filled = dict(arrays, x=np.where(valid[..., None], arrays["x"], np.float32(content)))
        delta, routing, gradients = layer_and_gradients(filled, valid, config, weights=(0.3, 0.2))
        np.testing.assert_array_equal(delta[~valid], 0.0)
        np.testing.assert_array_equal(gradients["x"][~valid], 0.0)
        results.append((delta, routing.gates_GSE, gradients))
    for other in results[1:]:
        jax.tree.map(functools.partial(assert_close, tolerance=1e-6), other, results[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_do_not_interact(algorithm):
    config, arrays, valid = build("renormalized")
    config = dataclasses.replace(config, dispatch=algorithm)
    delta, _, gradients = layer_and_gradients(arrays, valid, config)
    changed = {name: value.copy() for name, value in arrays.items()}
    changed["x"][0] += 1.0
    changed_valid = valid.copy()
    changed_valid[0] = ~valid[0]
    other, _, other_gradients = layer_and_gradients(changed, changed_valid, config)
    assert_close(other[1], delta[1], 1e-6)
    assert_close(other_gradients["x"][1], gradients["x"][1], 1e-6)
    assert np.abs(other[0] - delta[0]).max() > 0.1


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(a, marks=[pytest.mark.slow] if a != "ragged" else []) for a in ALGORITHMS],
)
def test_transformations_agree_with_a_plain_call(algorithm):
    config, arrays, valid = build("odd_sizes")
    config = dataclasses.replace(config, dispatch=algorithm)

    def layer(x, valid):
        return mix_experts(
            x, valid, arrays["router"], arrays["lora_a"], arrays["lora_b"], config,
            scale=1.5, deterministic=True,
        )[0]  # fmt: skip

    def gradient(function):
        def loss(x):
            return jnp.sum(function(x, valid) * arrays["cotangent"])

        return quick_jit(jax.grad(loss))(arrays["x"])

    def by_vmap(x, valid):
        return jax.vmap(layer)(x[:, None], valid[:, None])[:, 0]

    def by_scan(x, valid):
        step = jax.checkpoint(lambda carry, row: (carry, layer(row[0][None], row[1][None])[0]))
        return jax.lax.scan(step, 0, (x, valid))[1]

    expected, expected_gradient = layer(arrays["x"], valid), gradient(layer)
    for other in (layer, jax.checkpoint(layer), by_vmap, by_scan):
        assert_close(quick_jit(other)(arrays["x"], valid), expected, 1e-6)
        assert_close(gradient(other), expected_gradient, 1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_expert_input_of_its_own(algorithm):
    config, arrays, valid = build("plain")
    config = dataclasses.replace(config, dispatch=algorithm)
    other = arrays["x"][..., ::-1] * 0.5
    call = functools.partial(mix_experts, config=config, scale=2.0, deterministic=False)
    names = ("router", "lora_a", "lora_b")
    delta, routing = quick_jit(lambda x, valid, other, *weights: call(
        x, valid, *weights, expert_input_GSD=other
    ))(arrays["x"], valid, other, *(arrays[name] for name in names))  # fmt: skip
    expected = 2 * np.einsum(
        "gse,gsd,edr,erf->gsf", routing.gates_GSE, other, arrays["lora_a"], arrays["lora_b"]
    )
    assert_close(delta, expected)
    plain = layer_and_gradients(arrays, valid, config)[1]
    assert_close(routing.gates_GSE, plain.gates_GSE, 1e-6)


def test_groups_may_lie_on_several_devices():
    """Four host devices need a process of their own."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.routing.sharded"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["einsum", "masked", "ragged"]


def array_shapes(jaxpr):
    """Yields the shapes of all arrays of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from array_shapes(inner)


def traced_shapes(algorithm, groups, tokens):
    config = RoutingConfig(num_experts=6, num_selected_experts=2, dispatch=algorithm)
    arrays, valid = make_layer(config, groups, tokens, 5, 7, 3)
    traced = jax.make_jaxpr(lambda a, v: layer_and_gradients.__wrapped__(a, v, config))(
        arrays, valid
    )
    return set(array_shapes(traced.jaxpr))


def test_einsum_is_sized_by_capacity():
    capacity = 14  # ceil(1.25 * 2 * 32 / 6)
    shapes = traced_shapes("einsum", 2, 32)
    assert (2, 32, 6, capacity) in shapes
    assert (2, 6, capacity, 5) in shapes


def test_masked_has_no_array_of_tokens_by_tokens():
    tokens = 89
    shapes = traced_shapes("masked", 2, tokens)
    assert (2 * tokens, 6 * 3 + 6) in shapes
    for shape in shapes:
        assert sum(size >= tokens for size in shape) <= 1, shape


def test_auto_is_masked_while_the_joined_rank_is_small():
    assert choose_algorithm(16, 4, 1024, 1024, 2048, 4, 640) == "masked"
    assert choose_algorithm(16, 4, 64, 64, 128, 4, 40) == "masked"


@pytest.mark.parametrize(
    ("experts", "rank", "tokens", "capacity", "platform", "expected"),
    [
        (64, 64, 2048, 160, "tpu", "ragged"),
        (64, 64, 2048, 160, "cpu", "masked"),
        (64, 64, 64, 5, "cpu", "einsum"),
    ],
)
def test_auto_leaves_masked_for_many_wide_experts(
    experts, rank, tokens, capacity, platform, expected
):
    chosen = choose_algorithm(experts, rank, 512, 512, tokens, 4, capacity, platform=platform)
    assert chosen == expected


def test_auto_gives_what_its_choice_gives():
    config, arrays, valid = build("odd_sizes")
    auto, masked = (
        layer_and_gradients(arrays, valid, dataclasses.replace(config, dispatch=name))
        for name in ("auto", "masked")
    )
    jax.tree.map(np.testing.assert_array_equal, auto, masked)


def test_apply_experts_takes_a_routing():
    config, arrays, valid = build("plain")
    logits = jnp.asarray(arrays["x"] @ arrays["router"])
    routing = quick_route(logits, valid, config, deterministic=False)
    expected = loops(arrays, valid, config, scale=1.0).delta
    for algorithm in (*ALGORITHMS, "auto"):
        apply = quick_jit(apply_experts, static_argnames="algorithm")
        delta = apply(arrays["x"], routing, arrays["lora_a"], arrays["lora_b"], algorithm)
        assert_close(delta, expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lora_a", (8, 11, 4)),
        ("lora_a", (7, 12, 4)),
        ("lora_b", (8, 3, 10)),
        ("router", (12, 7)),
        ("router", (11, 8)),
    ],
)
def test_shapes_that_disagree_are_refused(name, shape):
    config, arrays, valid = build("plain")
    arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(ConfigError, match="shape"):
        layer_and_gradients(arrays, valid, config)


def test_an_unknown_algorithm_is_refused():
    config, arrays, valid = build("plain")
    routing = layer_and_gradients(arrays, valid, config)[1]
    with pytest.raises(ConfigError, match=r"algorithm='sorted'.*einsum, masked, ragged"):
        apply_experts(arrays["x"], routing, arrays["lora_a"], arrays["lora_b"], "sorted")
