"""SiRA against plain loops over tokens and experts, written from the equation.

The loops share no code with the library. Gradients are compared with central differences of the
loops, in float64.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import AdaptedDense, AdapterContext, SiRAConfig
from sira_jax.errors import MergeError

B, T, D, F, E, K, R = 2, 6, 5, 4, 4, 2, 2
CONFIG = {
    "num_experts": E,
    "num_selected_experts": K,
    "rank": R,
    "alpha": 3.0,
    "min_capacity": 1,
    "router_init_std": 1.0,
    "dispatch": "masked",
    "expert_dropout_rate": 0.0,
}
TRAINING = AdapterContext(deterministic=False)


def rows(groups):
    """Cuts (B, T) positions, row by row, into groups of the given size; None: one group a row."""
    positions = [(b, t) for b in range(B) for t in range(T)]
    size = T if groups is None else groups
    return [positions[start : start + size] for start in range(0, len(positions), size)], size


def loops(x, params, config, *, valid=None, training=False, mask=None):
    """Output and auxiliary losses of the equation.

    `mask` (B, T, E) multiplies the probabilities before the choice, or the chosen gates after it.
    """
    w = params["kernel"]
    router, a, b = (params["adapter"][name] for name in ("router", "lora_a", "lora_b"))
    valid = np.ones((B, T), bool) if valid is None else valid
    mask = np.ones((B, T, E)) if mask is None else mask
    scale = config.alpha / config.rank
    factor = config.capacity_factor if training else config.eval_capacity_factor
    y = np.zeros((B, T, w.shape[1]))
    for i in range(B):
        for t in range(T):
            y[i, t] = x[i, t] @ w
    chosen_share, mean_prob, z_loss = np.zeros(E), np.zeros(E), 0.0
    groups, size = rows(config.group_size)
    for group in groups:
        places = [math.inf] * E
        if factor is not None:
            choices = K if config.capacity_counts_k else 1
            places = [max(config.min_capacity, math.ceil(factor * choices * size / E))] * E
        ranked, gates = {}, {}
        for i, t in group:
            if not valid[i, t]:
                continue
            logits = x[i, t] @ router
            exps = [math.exp(v) for v in logits]
            probs = [v / sum(exps) for v in exps]
            z_loss += math.log(sum(exps)) ** 2
            before = config.expert_dropout_position == "before_topk"
            scores = [p * m if before else p for p, m in zip(probs, mask[i, t], strict=True)]
            order = sorted(range(E), key=lambda e: -scores[e])[:K]
            total = sum(scores[e] for e in order) if config.renormalize else 1.0
            ranked[i, t] = order
            gates[i, t] = {e: scores[e] / total * (1.0 if before else mask[i, t][e]) for e in order}
            for e in order:
                chosen_share[e] += 1
            mean_prob += probs
        for choice in range(K):
            for i, t in group:
                if (i, t) not in ranked:
                    continue
                e = ranked[i, t][choice]
                gate = gates[i, t][e]
                if gate == 0 or places[e] == 0:
                    continue
                places[e] -= 1
                y[i, t] += gate * scale * ((x[i, t] @ a[e]) @ b[e])
    tokens = max(valid.sum(), 1)
    balance = E * np.sum(chosen_share / tokens * mean_prob / tokens)
    return y, balance, z_loss / tokens


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    adapter = {"router": draw(D, E), "lora_a": draw(E, D, R), "lora_b": draw(E, R, F)}
    return {"kernel": draw(D, F), "adapter": adapter}


@pytest.fixture(scope="module")
def padding():
    valid = np.ones((B, T), bool)
    valid[0, 4:] = False
    valid[1, 0] = False
    return valid


def exact(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, context, rngs=None):
    return module.apply({"params": params}, x, context, rngs=rngs, mutable=["losses", "metrics"])


def run(config, params, x, context, rngs=None):
    return apply(AdaptedDense(features=F, adapter=config), params, x, context, rngs)


@functools.partial(jax.jit, static_argnums=0)
def init(module, x):
    return nn.unbox(module.init(jax.random.key(0), x, AdapterContext())["params"])


VARIANTS = {
    "no limit": {"capacity_factor": None},
    "one place an expert": {"capacity_factor": 0.2},
    "capacity": {"capacity_factor": 0.5},
    "capacity without k": {"capacity_factor": 1.0, "capacity_counts_k": False},
    "groups across rows": {"capacity_factor": 0.5, "group_size": 4},
    "groups with filling": {"capacity_factor": 0.5, "group_size": 5},
    "renormalised": {"capacity_factor": 0.5, "renormalize": True},
}


@pytest.mark.parametrize(
    ("variant", "dispatch"),
    [(variant, "masked") for variant in VARIANTS]
    + [("capacity", "einsum"), ("groups with filling", "ragged"), ("capacity", "auto")],
)
def test_output_in_training_is_the_loops(x, params, padding, variant, dispatch):
    config = SiRAConfig(**CONFIG | VARIANTS[variant] | {"dispatch": dispatch})
    context = TRAINING.replace(valid_BT=padding)
    y, _ = run(config, params, x, context)
    expected, _, _ = loops(exact(x), exact(params), config, valid=padding, training=True)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_capacity_changes_the_output_and_evaluation_has_its_own(x, params):
    """What the comparison above stands on: capacity bites, and the two factors are told apart."""
    config = SiRAConfig(**CONFIG, capacity_factor=0.2, eval_capacity_factor=0.8)
    free = SiRAConfig(**CONFIG, capacity_factor=None)
    trained, evaluated = (
        np.asarray(run(config, params, x, context)[0]) for context in (TRAINING, AdapterContext())
    )
    unlimited = np.asarray(run(free, params, x, TRAINING)[0])
    assert np.abs(trained - evaluated).max() > 0.1
    assert np.abs(trained - unlimited).max() > 0.1
    expected, _, _ = loops(exact(x), exact(params), config, training=False)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-4)
    expected, _, _ = loops(exact(x), exact(params), free)
    # By default evaluation turns nothing away.
    shown = run(SiRAConfig(**CONFIG, capacity_factor=0.2), params, x, AdapterContext())[0]
    np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dispatch", "renormalize"),
    [("masked", False), ("masked", True), ("einsum", False), ("ragged", False)],
)
def test_gradients_are_the_loops_differences(x, params, padding, dispatch, renormalize):
    weights = {"load_balance_loss_weight": 0.5, "router_z_loss_weight": 0.1}
    config = SiRAConfig(
        **CONFIG | {"dispatch": dispatch}, capacity_factor=0.5, renormalize=renormalize, **weights
    )
    cotangent = np.random.default_rng(2).normal(size=(B, T, F))
    cotangent *= padding[..., None]

    def loss(params, x):
        y, sown = run(config, params, x, TRAINING.replace(valid_BT=padding))
        return jnp.sum(y * cotangent) + sown["losses"]["adapter"]["router"][0]

    def exact_loss(params, x):
        y, balance, z_loss = loops(x, params, config, valid=padding, training=True)
        return np.sum(y * cotangent) + 0.5 * balance + 0.1 * z_loss

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    point = (exact(params), exact(x))
    leaves, tree = jax.tree.flatten(point)
    expected = []
    for leaf in leaves:
        slopes = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            kept, ends = leaf[index], []
            for step in (1e-6, -1e-6):
                leaf[index] = kept + step
                ends.append(exact_loss(*jax.tree.unflatten(tree, leaves)))
            leaf[index] = kept
            slopes[index] = (ends[0] - ends[1]) / 2e-6
        expected.append(slopes)
    for got, want in zip(jax.tree.leaves(grads), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("position", ["before_topk", "after_topk"])
def test_expert_dropout_is_the_loops_under_the_same_mask(x, params, padding, position):
    """The mask is read off the output: with E experts of one output feature each, all selected."""
    rate = 0.4
    shared = {
        "capacity_factor": None,
        "expert_dropout_rate": rate,
        "expert_dropout_position": position,
    }
    shown = SiRAConfig(**CONFIG | {"num_selected_experts": E, "rank": 1, "alpha": 1.0} | shared)
    probe = {
        "kernel": np.zeros((D, E), np.float32),
        "adapter": {
            "router": np.zeros((D, E), np.float32),
            "lora_a": np.ones((E, D, 1), np.float32) / D,
            "lora_b": np.eye(E, dtype=np.float32)[:, None] * E,
        },
    }
    rngs = {"expert_dropout": jax.random.key(3)}
    module = AdaptedDense(features=E, adapter=shown)
    mask = exact(apply(module, probe, np.ones((B, T, D)), TRAINING, rngs)[0])
    assert {round(v, 4) for v in np.unique(mask)} == {0.0, round(1 / (1 - rate), 4)}

    config = SiRAConfig(**CONFIG | shared)
    context = TRAINING.replace(valid_BT=padding)
    y, _ = run(config, params, x, context, rngs)
    expected, _, _ = loops(exact(x), exact(params), config, valid=padding, training=True, mask=mask)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    # Every gate on its own, at its rate, with the mean preserved.
    many = np.asarray(apply(module, probe, np.ones((100, 50, D)), TRAINING, rngs)[0])
    np.testing.assert_allclose((many == 0).mean(axis=(0, 1)), rate, atol=0.03)
    np.testing.assert_allclose(many.mean(axis=(0, 1)), 1.0, atol=0.05)
    both = np.mean((many[..., 0] == 0) & (many[..., 1] == 0))
    np.testing.assert_allclose(both, rate**2, atol=0.03)


def test_expert_dropout_and_input_dropout_are_off_outside_training(x, params):
    config = SiRAConfig(**CONFIG | {"expert_dropout_rate": 0.5, "dropout_rate": 0.5})
    plain = SiRAConfig(**CONFIG)
    y, _ = run(config, params, x, AdapterContext())
    np.testing.assert_array_equal(y, run(plain, params, x, AdapterContext())[0])


def test_input_dropout_is_not_seen_by_the_router_or_the_frozen_product(x, params):
    config = SiRAConfig(**CONFIG, dropout_rate=0.5, capacity_factor=None)
    rngs = {"dropout": jax.random.key(4)}
    dropped, sown = run(config, params, x, TRAINING, rngs)
    plain, plain_sown = run(SiRAConfig(**CONFIG, capacity_factor=None), params, x, TRAINING)
    assert np.abs(np.asarray(dropped - plain)).max() > 0.1
    for name in ("losses", "metrics"):
        jax.tree.map(np.testing.assert_array_equal, sown[name], plain_sown[name])
    # The experts are linear in their input, so the mean over masks is the output without.
    draws = jax.vmap(lambda key: run(config, params, x, TRAINING, {"dropout": key})[0])(
        jax.random.split(jax.random.key(5), 4000)
    )
    standard_error = np.std(draws, axis=0) / 4000**0.5
    assert np.all(np.abs(np.mean(draws, axis=0) - plain) < 5 * standard_error)


@pytest.mark.parametrize(
    ("dispatch", "dtype"),
    [("masked", "float32"), ("masked", "bfloat16"), ("einsum", "bfloat16"), ("ragged", "float32")],
)
def test_zero_b_leaves_the_output_bitwise_unchanged(x, params, dispatch, dtype):
    config = SiRAConfig(**CONFIG | {"dispatch": dispatch}, capacity_factor=0.5)
    module = AdaptedDense(features=F, adapter=config, dtype=dtype)
    params = {"kernel": params["kernel"], "adapter": dict(params["adapter"])}
    params["adapter"]["lora_b"] = np.zeros((E, R, F), np.float32)
    plain = AdaptedDense(features=F, dtype=dtype)
    expected, _ = apply(plain, {"kernel": params["kernel"]}, x, AdapterContext())
    np.testing.assert_array_equal(apply(module, params, x, TRAINING)[0], expected)


def test_initialisation():
    config = SiRAConfig(num_experts=8, rank=16, router_init_std=0.02)
    module = AdaptedDense(features=3, adapter=config)
    adapter = jax.device_get(init(module, np.ones((1, 1, 400)))["adapter"])
    assert {name: v.shape for name, v in adapter.items()} == {
        "router": (400, 8),
        "lora_a": (8, 400, 16),
        "lora_b": (8, 16, 3),
    }
    np.testing.assert_allclose(adapter["router"].std(), 0.02, rtol=0.06)
    bound = 400**-0.5
    assert np.abs(adapter["lora_a"]).max() <= bound
    # Experts do not count as fan-in, and no two are equal.
    np.testing.assert_allclose(adapter["lora_a"].std(axis=(1, 2)), bound / 3**0.5, rtol=0.05)
    assert len({float(v) for v in adapter["lora_a"][:, 0, 0]}) == 8
    assert not adapter["lora_b"].any()


def test_losses_are_weighted_and_metrics_are_the_loops(x, params, padding):
    config = SiRAConfig(
        **CONFIG, capacity_factor=0.4, load_balance_loss_weight=0.25, router_z_loss_weight=0.5
    )
    tasks = np.arange(B * T).reshape(B, T) % 3
    context = TRAINING.replace(valid_BT=padding, task_ids_BT=tasks, num_tasks=3)
    _, sown = run(config, params, x, context)
    _, balance, z_loss = loops(exact(x), exact(params), config, valid=padding, training=True)
    np.testing.assert_allclose(
        sown["losses"]["adapter"]["router"][0], 0.25 * balance + 0.5 * z_loss, rtol=1e-5
    )
    stats = sown["metrics"]["adapter"]["router"][0]
    assert stats.tokens == padding.sum()
    assert stats.selected_pairs == padding.sum() * K
    assert 0 < stats.dropped_pairs < stats.selected_pairs
    np.testing.assert_allclose(stats.kept_pairs_E.sum(), stats.selected_pairs - stats.dropped_pairs)
    logits = exact(x) @ exact(params)["adapter"]["router"]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(probs * np.log(probs)).sum(-1)
    np.testing.assert_allclose(stats.entropy_sum, entropy[padding].sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.confidence_sum, probs.max(-1)[padding].sum(), rtol=1e-5)
    for task in range(3):
        own = padding & (tasks == task)
        assert stats.task_tokens_Z[task] == own.sum()
        np.testing.assert_allclose(stats.task_entropy_sum_Z[task], entropy[own].sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.task_kept_pairs_ZE.sum(0), stats.kept_pairs_E)


def test_all_padding_gives_zeros_and_no_nan(x, params):
    config = SiRAConfig(**CONFIG, router_z_loss_weight=1.0)
    context = TRAINING.replace(valid_BT=np.zeros((B, T), bool))

    def loss(params):
        y, sown = run(config, params, x, context)
        return jnp.sum(y) * 0 + sown["losses"]["adapter"]["router"][0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_content_of_padding_has_no_influence(x, params, padding):
    config = SiRAConfig(**CONFIG, capacity_factor=0.5)
    context = TRAINING.replace(valid_BT=padding)
    other = np.where(padding[..., None], x, 1e6).astype(np.float32)
    first, first_sown = run(config, params, x, context)
    second, second_sown = run(config, params, other, context)
    np.testing.assert_array_equal(np.asarray(first)[padding], np.asarray(second)[padding])
    jax.tree.map(np.testing.assert_array_equal, first_sown, second_sown)


def test_router_stays_in_float32_under_bfloat16(x, params):
    """Its logits are those of the rounded input, but nothing after that is rounded."""
    config = SiRAConfig(**CONFIG, router_z_loss_weight=1.0, load_balance_loss_weight=0.0)
    module = AdaptedDense(features=F, adapter=config, dtype="bfloat16")
    _, sown = apply(module, params, x, TRAINING)
    rounded = exact(jnp.asarray(x, jnp.bfloat16))
    _, _, z_loss = loops(rounded, exact(params), config)
    np.testing.assert_allclose(sown["losses"]["adapter"]["router"][0], z_loss, rtol=1e-5)
    assert sown["losses"]["adapter"]["router"][0].dtype == jnp.float32


def test_merge_is_refused(params):
    with pytest.raises(MergeError, match="cannot be merged"):
        SiRAConfig(**CONFIG).merge(params["adapter"], params["kernel"])


@pytest.mark.parametrize(
    ("experts", "k", "rank", "d_in", "d_out"), [(4, 2, 3, 5, 7), (1, 1, 1, 2, 3)]
)
def test_counts_are_those_of_the_real_tree_and_of_the_hand(experts, k, rank, d_in, d_out):
    config = SiRAConfig(num_experts=experts, num_selected_experts=k, rank=rank)
    module = AdaptedDense(features=d_out, adapter=config)
    shapes = jax.eval_shape(lambda: init(module, jnp.ones((1, 1, d_in))))["adapter"]
    counted = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert config.count_parameters(d_in, d_out) == counted
    flops = config.flops_per_token(d_in, d_out)
    router, pair = d_in * experts, d_in * rank + rank * d_out
    assert flops.router == 2 * router
    assert flops.total == 2 * (router + k * pair)
