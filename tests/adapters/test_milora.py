"""MiLoRA against its equations in plain numpy: pooling, routing by prompt, gated projections."""

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
    LoRAConfig,
    MiLoRAConfig,
    make_config,
    merge,
)
from sira_jax.adapters.milora import (
    GELU_DENOMINATOR,
    GELU_NUMERATOR,
    POOLINGS,
    MiLoRARouter,
    rational,
)
from sira_jax.errors import ConfigError, MergeError
from sira_jax.models import Decoder
from sira_jax.training.evaluate import router_report
from tests.adapters.mixtures import differences
from tests.tiny import decoder_config, decoder_params, draw, make_batch, shapes_of

D = 5
poolings = pytest.mark.parametrize("pooling", POOLINGS)


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


def test_activation_starts_at_gelu():
    start = [jnp.asarray(each, jnp.float32) for each in (GELU_NUMERATOR, GELU_DENOMINATOR)]
    for bound, most in ((3, 0.005), (10, 0.005), (20, 0.5)):
        x = np.linspace(-bound, bound, 2001).astype(np.float32)
        assert np.abs(rational(x, *start) - gelu(x)).max() < most
    assert rational(jnp.zeros(1), *start)[0] == 0


def test_activation_is_the_quotient_of_its_polynomials_and_has_no_pole():
    rng = np.random.default_rng(0)
    numerator, denominator = rng.normal(size=7), rng.normal(size=5)
    x = np.linspace(-4, 4, 4001)
    top = sum(a * x**power for power, a in enumerate(numerator))
    bottom = sum(b * x**power for power, b in enumerate(denominator, 1))
    assert np.any(np.diff(np.sign(1 + bottom)) != 0)  # P / (1 + Q) would have poles here.
    got = rational(jnp.asarray(x, jnp.float32), jnp.asarray(numerator), jnp.asarray(denominator))
    np.testing.assert_allclose(got, top / (1 + np.abs(bottom)), rtol=1e-3, atol=1e-4)


# The router of a block.


def reference_router(params, config, x, segments, prompt):
    """Loops over examples in float64: gates (B, T, E), the loss, and each example's probabilities."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    experts, k = p["router"].shape[1], config.num_selected_experts
    gates = np.zeros((*segments.shape, experts))
    probs, chosen = [], []
    for row in range(segments.shape[0]):
        for number in sorted(set(segments[row]) - {0}):
            places = np.flatnonzero(segments[row] == number)
            used = [place for place in places if prompt[row, place]] or [places[0]]
            hidden = np.asarray(x[row, used], np.float64)
            if config.pooling == "last":
                pooled = hidden[-1]
            elif config.pooling == "mean":
                pooled = hidden.mean(axis=0)
            elif config.pooling == "max":
                pooled = hidden.max(axis=0)
            else:
                weights = np.exp(hidden @ p["query"])
                pooled = (weights / weights.sum()) @ hidden
            top = sum(a * pooled**power for power, a in enumerate(p["numerator"]))
            bottom = sum(b * pooled**power for power, b in enumerate(p["denominator"], 1))
            logits = (top / (1 + np.abs(bottom))) @ p["router"]
            prob = np.exp(logits - logits.max())
            prob /= prob.sum()
            selected = np.isin(np.arange(experts), np.argsort(-prob, kind="stable")[:k])
            gate = prob * selected
            gates[row, places] = gate / gate.sum() if config.renormalize else gate
            probs.append(prob)
            chosen.append(selected)
    balance = experts * np.sum(np.mean(chosen, axis=0) * np.mean(probs, axis=0))
    return gates, config.load_balance_loss_weight * balance, np.array(probs)


def packed(lengths, length, seed, left=False):
    """Segments (B, T) and random prompts: the first tokens of an example, none of some."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((len(lengths), length), np.int32)
    prompt = np.zeros(segments.shape, bool)
    for row, sizes in enumerate(lengths):
        start = length - sum(sizes) if left else 0
        for number, size in enumerate(sizes, 1):
            segments[row, start : start + size] = number
            prompt[row, start : start + rng.integers(size + 1)] = True
            start += size
    return segments, prompt


@functools.partial(jax.jit, static_argnums=0)
def run_router(config, params, x, segments, prompt):
    context = AdapterContext(valid_BT=segments > 0, segment_ids_BT=segments, prompt_BT=prompt)
    return MiLoRARouter(config).apply({"params": params}, x, context, mutable=["losses", "metrics"])


def draw_router(config, seed=0, scale=0.6):
    shapes = shapes_of(MiLoRARouter(config), np.ones((1, 2, D), np.float32), AdapterContext())
    return draw(shapes, seed, scale)


@poolings
@settings(max_examples=3, deadline=None)
@given(
    k=st.integers(1, 7),
    renormalize=st.booleans(),
    left=st.booleans(),
    lengths=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_gates_loss_and_statistics_are_the_equations(pooling, k, renormalize, left, lengths, seed):
    config = MiLoRAConfig(
        num_selected_experts=k,
        renormalize=renormalize,
        pooling=pooling,
        load_balance_loss_weight=0.3,
    )
    lengths = [[1, 2], *lengths]
    params = draw_router(config, seed)
    segments, prompt = packed(lengths, 9, seed, left)
    x = np.random.default_rng(seed).normal(size=(*segments.shape, D)).astype(np.float32)
    gates, sown = run_router(config, params, x, segments, prompt)
    expected, loss, probs = reference_router(params, config, x, segments, prompt)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(gates)[real], expected[real], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(sown["losses"]["router"][0], loss, rtol=1e-4)
    stats = sown["metrics"]["router"][0]
    assert stats.tokens == len(probs)
    assert stats.selected_pairs == k * len(probs) == stats.kept_pairs_E.sum()
    np.testing.assert_allclose(stats.confidence_sum, probs.max(axis=1).sum(), rtol=1e-4)
    entropy = -np.sum(probs * np.log(probs))
    np.testing.assert_allclose(stats.entropy_sum, entropy, rtol=1e-4)


@poolings
def test_gradients_of_the_router_are_those_of_finite_differences(pooling):
    """Through the gates and the balance loss, away from where the selection changes."""
    config = MiLoRAConfig(num_selected_experts=3, pooling=pooling, load_balance_loss_weight=0.5)
    params = draw_router(config)
    segments, prompt = packed([[4, 3], [6]], 8, 1)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(*segments.shape, D)).astype(np.float32)
    cotangent = rng.normal(size=(*segments.shape, 7)) * (segments > 0)[..., None]

    def loss(params, x):
        gates, sown = run_router(config, params, x, segments, prompt)
        return jnp.sum(gates * cotangent) + sown["losses"]["router"][0]

    def exact_loss(params, x):
        gates, balance, _ = reference_router(params, config, x, segments, prompt)
        return np.sum(gates * cotangent) + balance

    # f_e is a constant to the gradient in both, since a small step selects the same experts.
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    wanted = differences(exact_loss, (params, x))
    for grad, slope in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(grad, slope, rtol=2e-3, atol=1e-4)


@poolings
def test_only_the_prompt_decides_and_each_example_by_itself(pooling):
    config = MiLoRAConfig(pooling=pooling)
    params = draw_router(config)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]], np.int32)
    prompt = np.array([[1, 1, 0, 1, 0, 0, 1]], bool)
    x = np.random.default_rng(0).normal(size=(1, 7, D)).astype(np.float32)
    gates = np.asarray(run_router(config, params, x, segments, prompt)[0])
    other = x.copy()
    other[0, [2, 4, 5]] += 1.0
    other[0, 6] = 1e30
    np.testing.assert_array_equal(
        run_router(config, params, other, segments, prompt)[0][:, :5], gates[:, :5]
    )
    changed = x.copy()
    changed[0, 1] += 1.0
    second = np.asarray(run_router(config, params, changed, segments, prompt)[0])
    np.testing.assert_array_equal(second[:, 3:5], gates[:, 3:5])
    assert np.abs(second[:, :3] - gates[:, :3]).max() > 1e-3
    assert np.all(np.count_nonzero(gates[:, :5], axis=-1) == 3)


def test_an_example_without_a_prompt_is_routed_by_its_first_token():
    config = MiLoRAConfig(pooling="mean")
    params = draw_router(config)
    segments = np.array([[1, 1, 2, 2, 2]], np.int32)
    prompt = np.array([[1, 0, 0, 0, 0]], bool)
    explicit = np.array([[1, 0, 1, 0, 0]], bool)
    x = np.random.default_rng(0).normal(size=(1, 5, D)).astype(np.float32)
    np.testing.assert_array_equal(
        run_router(config, params, x, segments, prompt)[0],
        run_router(config, params, x, segments, explicit)[0],
    )


def test_without_segments_a_row_is_one_example_and_all_tokens_its_prompt():
    config = MiLoRAConfig()
    params = draw_router(config)
    x = np.random.default_rng(0).normal(size=(2, 4, D)).astype(np.float32)
    gates = jax.jit(MiLoRARouter(config).apply)({"params": params}, x, AdapterContext())
    assert gates.shape == (2, 1, 7)
    ones = np.ones((2, 4), np.int32)
    expected = run_router(config, params, x, ones, ones > 0)[0]
    np.testing.assert_allclose(np.broadcast_to(gates, (2, 4, 7)), expected, rtol=1e-6)


def test_router_computes_in_float32_and_a_batch_of_padding_is_no_error():
    config = MiLoRAConfig()
    params = draw_router(config)
    segments, prompt = packed([[4], [2, 3]], 6, 0)
    x = np.random.default_rng(0).normal(size=(2, 6, D))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    half = run_router(config, params, jnp.asarray(x, jnp.bfloat16), segments, prompt)[0]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, run_router(config, params, x, segments, prompt)[0], rtol=1e-6)

    def loss(params):
        gates, sown = run_router(config, params, x, segments * 0, prompt)
        return jnp.sum(gates) + sown["losses"]["router"][0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


@functools.partial(jax.jit, static_argnums=0)
def run_decoder(model, params, batch):
    """What the blocks sow."""
    return model.apply({"params": params}, batch, mutable=["losses", "metrics"])[1]


@pytest.mark.parametrize("targets", [("q",), ("v", "down", "k")])
def test_experts_are_the_targeted_projections(targets):
    config = MiLoRAConfig(rank=2, targets=targets, num_selected_experts=1)
    assert len(config.experts) == len(targets)
    assert config.experts == tuple(sorted(config.experts, key="qkvogateupdown".find))
    model = Decoder(decoder_config(), config)
    params = decoder_params(model)
    assert params["layers"]["adapter"]["router"].shape == (2, 8, len(targets))
    sown = run_decoder(model, params, make_batch([(5, 3), (7,)], 8))
    # One router a block: losses and statistics are the blocks', not the projections'.
    assert [leaf.shape for leaf in jax.tree.leaves(sown["losses"])] == [(2,)]
    report = router_report(sown["metrics"], ("one",))["projections"]
    assert set(report) == {"block"}
    assert np.shape(report["block"]["expert_load"]) == (2, len(targets))
    if targets == ("q",):
        np.testing.assert_array_equal(report["block"]["router_confidence"], 1.0)


def test_statistics_count_the_prompts_of_each_task():
    model = Decoder(decoder_config(scan_layers=False), MiLoRAConfig(rank=2), num_tasks=2)
    batch = make_batch([(5, 3), (7,)], 8, num_tasks=2, seed=2)
    starts = batch["decoder_segment_ids"] > 0
    starts &= batch["decoder_positions"] == 0
    counts = np.bincount(batch["task_ids"][starts], minlength=2)
    assert np.all(counts > 0)
    sown = run_decoder(model, decoder_params(model), batch)
    report = router_report(sown["metrics"], ("a", "b"))["projections"]["block"]
    np.testing.assert_array_equal(report["task_tokens"], [counts] * 2)


# A projection.


def test_projection_is_lora_times_its_gate():
    config = MiLoRAConfig(rank=2, alpha=3.0, targets=("k", "down"), num_selected_experts=1)
    module = AdaptedDense(features=4, adapter=config.for_projection("mlp/down"), path="mlp/down")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, D)).astype(np.float32)
    params = draw(shapes_of(module, x, AdapterContext()))
    a, b = (np.asarray(params["adapter"][name], np.float64) for name in ("lora_a", "lora_b"))
    for gates in (rng.uniform(size=(2, 3, 2)), rng.uniform(size=(2, 1, 2))):
        context = AdapterContext(block=jnp.asarray(gates, jnp.float32))
        expected = x @ np.asarray(params["kernel"], np.float64)
        expected += gates[..., 1:] * 1.5 * (x @ a @ b)
        y = module.apply({"params": params}, x, context)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    lora = AdaptedDense(features=4, adapter=LoRAConfig(rank=2, alpha=3.0))
    np.testing.assert_allclose(
        module.apply({"params": params}, x, AdapterContext()),
        lora.apply({"params": params}, x, AdapterContext()),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dropout_acts_on_the_pair_in_training_alone():
    config = MiLoRAConfig(rank=D, alpha=float(D), dropout_rate=0.5)
    module = AdaptedDense(features=D, adapter=config, path="attention/q")
    eye = np.eye(D, dtype=np.float32)
    params = {"kernel": eye, "adapter": {"lora_a": eye, "lora_b": eye}}
    context = AdapterContext(block=jnp.full((50, 1, 7), 0.5), deterministic=False)
    rngs = {"dropout": jax.random.key(0)}
    y = module.apply({"params": params}, np.ones((50, 20, D), np.float32), context, rngs=rngs)
    values, counts = np.unique(np.asarray(y), return_counts=True)
    np.testing.assert_allclose(values, [1.0, 2.0])
    np.testing.assert_allclose(counts[0] / counts.sum(), 0.5, atol=0.03)


# The config.


@pytest.mark.parametrize(
    ("field", "fields", "allowed"),
    [
        ("num_selected_experts", {"num_selected_experts": 8}, "at most 7"),
        ("num_selected_experts", {"targets": ("q", "v")}, "at most 2"),
        ("num_selected_experts", {"num_selected_experts": 0}, "at least 1"),
        ("pooling", {"pooling": "sum"}, "one of attention, mean, max, last"),
        ("renormalize", {"renormalize": 1}, "true or false"),
        ("load_balance_loss_weight", {"load_balance_loss_weight": -1}, "0 or more"),
        ("router_init_std", {"router_init_std": None}, "0 or more"),
        ("targets", {"targets": ("x",)}, "at least one of attention/q"),
        (r"overrides\['q'\]", {"overrides": {"q": {"pooling": "max"}}}, "share one router"),
    ],
)
def test_wrong_fields_are_named(field, fields, allowed):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}=.*{allowed}"):
        make_config({"method": "milora"} | fields)


def test_defaults_are_the_papers_and_overrides_set_a_projections_pair():
    config = MiLoRAConfig(overrides={"down": {"rank": 8}})
    assert (config.rank, config.num_selected_experts, config.pooling) == (32, 3, "attention")
    assert config.load_balance_loss_weight == 1e-2
    assert len(config.experts) == 7
    down = config.for_projection("mlp/down")
    assert (down.rank, down.experts) == (8, config.experts)


@poolings
def test_costs(pooling):
    config = MiLoRAConfig(rank=7, num_selected_experts=3, pooling=pooling)
    pair = 7 * (4 + 6)
    assert config.count_parameters(4, 6) == pair
    assert config.active_parameters(4, 6) == pair * 3 // 7
    assert config.flops_per_token(4, 6).total == 2 * pair * 3 // 7
    counted = sum(leaf.size for leaf in jax.tree.leaves(draw_router(config)))
    assert config.count_block_parameters(D) == counted


def test_merging_is_refused_with_the_reason():
    model = Decoder(decoder_config(), MiLoRAConfig(rank=2))
    params = decoder_params(model)
    for refused in (
        lambda: merge(model.adapter, params),
        lambda: model.adapter.merge({}, jnp.zeros((2, 2))),
    ):
        with pytest.raises(MergeError, match=r"milora.*: the router picks"):
            refused()
