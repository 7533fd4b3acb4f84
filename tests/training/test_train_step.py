"""The loss against a plain cross-entropy, and what a step may and may not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.models import Decoder
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import (
    TrainState,
    count,
    merge_params,
    split_params,
)
from sira_jax.training.train_step import (
    auxiliary_loss,
    make_train_step,
    router_summary,
    step_rngs,
    token_losses,
)
from tests.tiny import decoder_config, decoder_params, make_batch, shapes_of

LORA = LoRAConfig(rank=2, targets=("q", "v", "down"))
SIRA = SiRAConfig(
    expert_dropout_rate=0.0,
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    capacity_factor=1.0,
    min_capacity=1,
    router_init_std=0.5,
    load_balance_loss_weight=0.1,
    targets=("down",),
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, clip_norm=None)
BATCH = make_batch([(5, 3), (7,), (4, 2, 2), (3,)], 8, num_tasks=2)


def build(adapter, batch=BATCH, **options):
    """A compiled step without donation, a fresh state, and the frozen parameters."""
    model = Decoder(decoder_config(), adapter, num_tasks=len(options.get("task_names", ())))
    optimizer = make_optimizer(OPTIMIZER, 10)
    schedule = make_schedule(OPTIMIZER, 10)
    step = make_train_step(model, optimizer, schedule, seed=0, num_steps=10, **options)
    trained, frozen = split_params(decoder_params(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        if path[-1].key == "lora_b":
            leaf[:] = 0
    state = TrainState(step=jnp.int32(0), adapter=trained, optimizer=optimizer.init(trained))
    compiled = jax.jit(step).lower(state, frozen, batch).compile()
    return model, compiled, state, frozen


@pytest.fixture(scope="module")
def lora():
    return build(LORA)


TASKS = ("first", "second", "absent")


@pytest.fixture(scope="module")
def sira():
    return build(SIRA, task_names=TASKS)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, state, frozen, batch):
    """Logits and what is sown, as in training."""
    params = merge_params(state.adapter, frozen)
    return model.apply(
        {"params": params}, batch, deterministic=False, mutable=["losses", "metrics"]
    )


def cross_entropy(logits, targets):
    """Nats and hits of each position, in float64."""
    nats, hits = np.zeros(targets.shape), np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        row = np.asarray(logits[index], np.float64)
        top = row.max()
        nats[index] = top + np.log(np.exp(row - top).sum()) - row[targets[index]]
        hits[index] = row.argmax() == targets[index]
    return nats, hits


def test_loss_is_the_mean_over_target_tokens(lora):
    model, step, state, frozen = lora
    _, metrics = step(state, frozen, BATCH)
    logits, _ = apply(model, state, frozen, BATCH)
    nats, hits = cross_entropy(logits, BATCH["decoder_target_tokens"])
    targets = BATCH["decoder_loss_weights"] > 0
    assert 0 < targets.sum() < (BATCH["decoder_segment_ids"] > 0).sum()
    np.testing.assert_allclose(metrics["loss"], nats[targets].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], hits[targets].mean(), rtol=1e-6)
    assert metrics["target_tokens"] == targets.sum()
    assert metrics["tokens"] == (BATCH["decoder_segment_ids"] > 0).sum()
    assert metrics["auxiliary_loss"] == 0
    np.testing.assert_allclose(metrics["learning_rate"], 0.01)
    assert not any(name.startswith("router/") for name in metrics)


def test_fractional_weights_weigh(lora):
    model, step, state, frozen = lora
    rng = np.random.default_rng(0)
    weights = BATCH["decoder_loss_weights"] * rng.uniform(0.5, 2.0, (4, 8)).astype(np.float32)
    _, metrics = step(state, frozen, BATCH | {"decoder_loss_weights": weights})
    logits, _ = apply(model, state, frozen, BATCH)
    nats, _ = cross_entropy(logits, BATCH["decoder_target_tokens"])
    np.testing.assert_allclose(metrics["loss"], (nats * weights).sum() / weights.sum(), rtol=1e-5)


def test_what_carries_no_loss_has_no_influence(lora):
    _, step, state, frozen = lora
    before = step(state, frozen, BATCH)
    silent = BATCH["decoder_loss_weights"] == 0
    other = np.where(silent, 1, BATCH["decoder_target_tokens"])
    assert np.any(other != BATCH["decoder_target_tokens"])
    after = step(state, frozen, BATCH | {"decoder_target_tokens": other})
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("which", ["lora", "sira"])
def test_batch_without_targets_gives_no_loss_and_no_nan(which, request):
    _, step, state, frozen = request.getfixturevalue(which)
    empty = BATCH | {"decoder_loss_weights": np.zeros((4, 8), np.float32)}
    new_state, metrics = step(state, frozen, empty)
    assert metrics["loss"] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new_state))
    # Only a task without tokens may have no number.
    named = {name for name, value in metrics.items() if not np.isfinite(value)}
    assert named <= {"router/gate_entropy/absent"}
    padding = jax.tree.map(np.zeros_like, BATCH)
    new_state, metrics = step(state, frozen, padding)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new_state))
    assert metrics["gradient_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, new_state.adapter, state.adapter)


@pytest.mark.parametrize(
    ("tie", "chunk_sizes"), [(True, (1, 3, 64)), (False, (7,))], ids=["tied", "untied"]
)
def test_chunked_loss_equals_the_whole(tie, chunk_sizes):
    model = Decoder(decoder_config(tie_embeddings=tie))
    params = decoder_params(model)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(1, 7, 8)).astype(np.float32)
    targets = rng.integers(0, 23, (1, 7))

    @functools.partial(jax.jit, static_argnums=0)
    def both(size, features, params, batch):
        def total(features, params):
            nats, right = token_losses(model, params, features, batch, size)
            return jnp.sum(nats * jnp.arange(1.0, 8.0)), (nats, right)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(features, params)

    head = jax.jit(functools.partial(model.apply, method="logits"))
    nats, hits = cross_entropy(head({"params": params}, features), targets)
    for weights in (
        [1, 0, 1, 1, 0, 0, 1],
        [0, 0, 0.5, 2, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ):
        batch = {
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.asarray([weights], np.float32),
        }
        whole = both(0, features, params, batch)
        np.testing.assert_allclose(whole[0][1][0], nats * weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(whole[0][1][1], hits * weights)
        for size in chunk_sizes:
            assert_trees_close(both(size, features, params, batch), whole)


def assert_trees_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def adapter_gradient(step, state, frozen, batch):
    """AdamW's first moment after one step is a tenth of the gradient."""
    new_state, metrics = step(state, frozen, batch)
    mu = next(part.mu for part in new_state.optimizer if hasattr(part, "mu"))
    return jax.tree.map(lambda leaf: np.asarray(leaf) * 10, mu), metrics


def moved(state):
    """The state with a B that is not zero, so that every gradient is."""
    rng = np.random.default_rng(5)
    adapter = jax.tree.map(
        lambda leaf: leaf + rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), state.adapter
    )
    return state.replace(adapter=adapter)


def test_accumulated_gradient_is_the_whole_batchs(lora):
    """The rows have 4, 5, 2 and 1 target tokens: microbatches must be weighed by them."""
    _, whole, state, frozen = lora
    _, parts, _, _ = build(LORA, accumulation_steps=4, loss_chunk_size=3)
    assert len(set(BATCH["decoder_loss_weights"].sum(axis=1))) == 4
    expected, metrics = adapter_gradient(whole, moved(state), frozen, BATCH)
    got, accumulated = adapter_gradient(parts, moved(state), frozen, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)
    assert set(accumulated) == set(metrics)
    for name in metrics:
        np.testing.assert_allclose(accumulated[name], metrics[name], rtol=1e-5)


def test_accumulation_with_routers(sira):
    """Groups are rows, so routing does not see the microbatches; auxiliary losses are averaged."""
    model, whole, state, frozen = sira
    _, parts, _, _ = build(SIRA, accumulation_steps=2, task_names=TASKS)
    state = moved(state)
    _, metrics = whole(state, frozen, BATCH)
    _, accumulated = parts(state, frozen, BATCH)
    for name in metrics:
        if name not in ("auxiliary_loss", "gradient_norm", "parameter_norm"):
            np.testing.assert_allclose(accumulated[name], metrics[name], rtol=1e-5)
    losses = []
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: values[half] for name, values in BATCH.items()}
        _, sown = apply(model, state, frozen, part)
        losses.append(auxiliary_loss(sown["losses"]))
    np.testing.assert_allclose(accumulated["auxiliary_loss"], np.mean(losses), rtol=1e-5)


def test_auxiliary_loss_is_the_mean_over_adapters():
    sown = {
        "layers": {"q": {"router": (jnp.asarray([1.0, 2.0, 3.0]),)}},
        "other": {"router": (jnp.asarray(6.0),)},
    }
    assert auxiliary_loss(sown) == 3.0
    assert auxiliary_loss({}) == 0.0


def test_router_summary_counts_over_layers(sira):
    model, step, state, frozen = sira
    state = moved(state)
    _, metrics = step(state, frozen, BATCH)
    _, sown = apply(model, state, frozen, BATCH)
    stats = sown["metrics"]["layers"]["mlp"]["down"]["adapter"]["router"][0]
    dropped, selected, entropy, tokens = (
        float(getattr(stats, name).sum())
        for name in ("dropped_pairs", "selected_pairs", "entropy_sum", "tokens")
    )
    assert dropped > 0
    np.testing.assert_allclose(metrics["router/dropped_share"], dropped / selected, rtol=1e-5)
    np.testing.assert_allclose(metrics["router/gate_entropy"], entropy / tokens, rtol=1e-5)
    confidence = float(stats.confidence_sum.sum())
    np.testing.assert_allclose(metrics["router/confidence"], confidence / tokens, rtol=1e-5)
    kept_E = np.asarray(stats.kept_pairs_E).sum(axis=0)
    loads = [metrics[f"router/expert_load/{expert:03d}"] for expert in range(4)]
    np.testing.assert_allclose(loads, kept_E / kept_E.sum(), rtol=1e-5)
    entropy_Z = np.asarray(stats.task_entropy_sum_Z).sum(axis=0)
    tokens_Z = np.asarray(stats.task_tokens_Z).sum(axis=0)
    assert tokens_Z[2] == 0
    for index, task in enumerate(TASKS[:2]):
        own = metrics[f"router/gate_entropy/{task}"]
        np.testing.assert_allclose(own, entropy_Z[index] / tokens_Z[index], rtol=1e-5)
    assert np.isnan(metrics["router/gate_entropy/absent"])
    assert router_summary({}) == {}


@pytest.mark.parametrize("which", ["lora", "sira"])
def test_trained_leaves_all_move_and_frozen_ones_do_not(which, request):
    _, step, state, frozen = request.getfixturevalue(which)
    before = jax.tree.map(np.array, frozen)
    first, _ = step(state, frozen, BATCH)
    second, metrics = step(first, frozen, BATCH)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert int(second.step) == 2
    assert metrics["gradient_norm"] > 0
    leaves = jax.tree.leaves(second.adapter)
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
    np.testing.assert_allclose(metrics["parameter_norm"], norm, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(second.adapter):
        name, start = path[-1].key, state.adapter
        for entry in path:
            start = start[entry.key]
        for layer in range(2):
            assert np.any(leaf[layer] != start[layer]), path
        if which == "lora" and name == "lora_a":
            # A has no gradient while B is zero, so the first step leaves it.
            fresh = first.adapter
            for entry in path:
                fresh = fresh[entry.key]
            np.testing.assert_array_equal(fresh, start)


@pytest.mark.parametrize(("which", "adapter"), [("lora", LORA), ("sira", SIRA)])
def test_state_holds_nothing_of_the_base(which, adapter, request):
    _, _, state, frozen = request.getfixturevalue(which)
    sizes = {"q": (8, 16), "v": (8, 8), "down": (12, 8)}
    names = [name for name in sizes if adapter.for_projection(name)]
    expected = 2 * sum(adapter.count_parameters(*sizes[name]) for name in names)
    assert count(state.adapter) == expected
    # AdamW's two moments; besides them counters of steps.
    counters = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
    assert count(state.optimizer) == 2 * expected + len(counters)
    assert not any(
        leaf is kernel for kernel in jax.tree.leaves(frozen) for leaf in jax.tree.leaves(state)
    )


def compiled_memory(length, loss_chunk_size, **sizes):
    """Memory of a compiled step on one row, and the bytes of the base, without any array made."""
    model = Decoder(decoder_config(**sizes), LoRAConfig(rank=1, targets="q"))
    optimizer = make_optimizer(OPTIMIZER, 10)
    schedule = make_schedule(OPTIMIZER, 10)
    step = make_train_step(
        model, optimizer, schedule, seed=0, num_steps=10, loss_chunk_size=loss_chunk_size
    )
    trained, frozen = split_params(
        shapes_of(model, {"decoder_input_tokens": jnp.zeros((1, 2), int)})
    )
    state = TrainState(
        step=jnp.int32(0), adapter=trained, optimizer=jax.eval_shape(optimizer.init, trained)
    )
    batch = make_batch([(length,)], length)
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    return compiled.memory_analysis(), 4 * count(frozen)


def test_no_gradient_of_the_base_is_ever_held():
    """A larger base makes the step's arguments larger, but its results not at all.

    A gradient or moment of the grown parts would show in the temporary memory as at least the size
    of the smaller one. Two tokens keep the activations, which grow as well, small beside it; of
    four layers the compiler copies one at a time.
    """
    sizes = {"emb_dim": 64, "num_layers": 4}
    few, few_bytes = compiled_memory(2, 0, **sizes, mlp_dim=16, vocab_size=16)
    many, many_bytes = compiled_memory(2, 0, **sizes, mlp_dim=16 + 1024, vocab_size=16 + 8192)
    mlp, table = 4 * (4 * 3) * 1024 * 64, 4 * 8192 * 64
    assert many_bytes - few_bytes == mlp + table
    assert many.argument_size_in_bytes - few.argument_size_in_bytes == mlp + table
    assert many.output_size_in_bytes == few.output_size_in_bytes
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < 0.8 * min(mlp, table)


@pytest.mark.slow
def test_chunked_loss_does_not_hold_the_table_for_each_chunk():
    table = 4 * 4096 * 64
    sizes = {"vocab_size": 4096, "emb_dim": 64, "num_layers": 1}
    few, many = (compiled_memory(length, 16, **sizes)[0].temp_size_in_bytes for length in (32, 256))
    # From 2 to 16 chunks, where only the activations of 224 more positions come on top; their
    # logits together would be 3.5 tables.
    assert many - few < 2 * table


def test_state_is_donated(lora):
    model, _, state, frozen = lora
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_train_step(model, optimizer, make_schedule(OPTIMIZER, 10), seed=0, num_steps=10)
    state = jax.tree.map(jnp.array, state)
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, BATCH).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == held
    compiled(state, frozen, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_keys_differ_by_seed_step_microbatch_and_purpose():
    keys = [
        jax.random.key_data(key).tobytes()
        for seed, step, microbatch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
        for second_pass in (False, True)
        for key in step_rngs(seed, step, microbatch, second_pass).values()
    ]
    assert len(set(keys)) == len(keys) == 4 * 2 * 3
    again = step_rngs(0, jnp.int32(1), jnp.int32(0))["dropout"]
    assert jnp.array_equal(
        jax.random.key_data(again), jax.random.key_data(step_rngs(0, 1, 0)["dropout"])
    )


def test_dropout_follows_the_step_and_the_microbatch():
    """Equal rows in all microbatches, of a model whose dropout bites, have different losses."""
    adapter = LoRAConfig(rank=2, dropout_rate=0.5, targets="q")
    _, step, state, frozen = build(adapter)
    state = moved(state)
    one, same = step(state, frozen, BATCH)[1], step(state, frozen, BATCH)[1]
    later = step(state.replace(step=jnp.int32(1)), frozen, BATCH)[1]
    assert one["loss"] == same["loss"]
    assert one["loss"] != later["loss"]
