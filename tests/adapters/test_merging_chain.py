"""Chains of merged stages (XGBLoRA, RAC-LoRA) in training: when they merge, what of it is kept, and how they resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import RACLoRAConfig, StepInfo, XGBLoRAConfig, merge, split_trained
from sira_jax.adapters.trees import by_projection
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import TrainState, init_adapter, merge_params, split_params
from sira_jax.training.train_step import make_train_step
from tests.tiny import decoder_config, decoder_params, draw, make_batch, shapes_of
from tests.training.tiny_run import EXPERIMENT, Batches, assert_same_run, trainer

LAYERS, STEPS, MERGE_EVERY = 3, 7, 3
CHAINS = {
    "xgblora": XGBLoRAConfig(
        rank=2, num_layers_per_stage=2, merge_every=MERGE_EVERY, targets=("q", "down")
    ),
    "rac_right": RACLoRAConfig(rank=2, merge_every=MERGE_EVERY, targets=("q", "down")),
    "rac_left": RACLoRAConfig(
        rank=2, merge_every=MERGE_EVERY, sketch="left", targets=("q", "down")
    ),
}
PLACES = (("attention", "q"), ("mlp", "down"))
BATCH = make_batch([(5, 3), (7,)], 8)
# Weight decay, which would move parameters that have no gradient.
OPTIMIZER = OptimizerConfig(
    learning_rate=0.02, weight_decay=0.1, schedule="constant", clip_norm=None
)

# RAC-LoRA's two sketches share their code: of the costly checks the fast suite runs one chain's.
chains = pytest.mark.parametrize(
    "name",
    [n if n == "xgblora" else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS],
)


@functools.cache
def run(name, merge_every=MERGE_EVERY):
    """(model, states from the first on, frozen before, frozen after) of a few steps, compiled once."""
    config = dataclasses.replace(CHAINS[name], merge_every=merge_every)
    model = Decoder(decoder_config(num_layers=LAYERS), config)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    step = make_train_step(
        model, optimizer, make_schedule(OPTIMIZER, STEPS), seed=0, num_steps=STEPS
    )
    step = jax.jit(step, donate_argnums=0)
    adapter = init_adapter(model, 0)
    frozen = split_params(decoder_params(model))[1]
    before = jax.tree.map(np.copy, frozen)
    state = TrainState(
        step=jnp.int32(0), adapter=adapter, optimizer=optimizer.init(split_trained(adapter)[0])
    )
    states = [jax.tree.map(np.array, state)]
    for _ in range(STEPS):
        state, metrics = step(state, frozen, BATCH)
        assert np.isfinite(metrics["loss"])
        states.append(jax.tree.map(np.array, state))
    # A merge is part of the one compiled step.
    assert step._cache_size() == 1
    return model, states, before, frozen


def leaves_of(state, place):
    return state.adapter["layers"][place[0]][place[1]]["adapter"]


def product(config, leaves):
    """s A B of each layer, float64; 0 in layers that XGBLoRA's stage does not train."""
    a, b = (
        np.asarray(leaves.get(name, leaves.get(f"buffer_{name}")), np.float64)
        for name in ("lora_a", "lora_b")
    )
    active = leaves.get("buffer_active", np.ones(len(a)))
    scale = config.alpha / config.rank
    return np.stack([scale * active[layer] * (a[layer] @ b[layer]) for layer in range(len(a))])


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({"params": params}, BATCH)


@chains
def test_merges_come_after_every_third_step_and_are_the_stages_product(name):
    model, states, _, _ = run(name)
    _, unmerged, _, _ = run(name, merge_every=100)
    for place in PLACES:
        sums = [leaves_of(state, place)["buffer_merged"] for state in states]
        assert not np.any(sums[0])
        for step in range(1, STEPS + 1):
            is_new = np.any(sums[step] != sums[step - 1])
            assert is_new == (step % MERGE_EVERY == 0), step
        # Up to the first merge the two runs are one; a run without a merge shows what the stage learnt.
        expected = product(model.adapter, leaves_of(unmerged[MERGE_EVERY], place))
        np.testing.assert_allclose(sums[MERGE_EVERY], expected, rtol=1e-5, atol=1e-7)
        assert not np.any(leaves_of(unmerged[-1], place)["buffer_merged"])
        # Two stages of rank 2: the sum outgrows a stage's rank.
        stages = 2 if name.startswith("rac") else 1
        ranks = np.linalg.matrix_rank(sums[2 * MERGE_EVERY], tol=1e-5)
        assert max(ranks) >= 2 * stages
        if stages == 2:
            np.testing.assert_array_equal(ranks, 4)


@chains
def test_a_merge_does_not_change_the_function(name):
    model, states, _, frozen = run(name)
    _, unmerged, _, _ = run(name, merge_every=100)
    after = logits(model, merge_params(states[MERGE_EVERY].adapter, frozen))
    before = logits(model, merge_params(unmerged[MERGE_EVERY].adapter, frozen))
    start = logits(model, merge_params(states[0].adapter, frozen))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert np.abs(after - start).max() > 0.01


@chains
def test_a_stage_starts_with_a_product_of_zero_and_new_random_factors(name):
    model, states, _, _ = run(name)
    drawn = "buffer_lora_b" if name == "rac_left" else "lora_a"
    drawn = "buffer_lora_a" if name == "rac_right" else drawn
    for place in PLACES:
        starts = [leaves_of(states[step], place) for step in (0, MERGE_EVERY, 2 * MERGE_EVERY)]
        for leaves in starts:
            assert not np.any(product(model.adapter, leaves))
            assert np.any(leaves[drawn])
        flat = [leaves[drawn][layer] for leaves in starts for layer in range(LAYERS)]
        flat = [factor.tobytes() for factor in flat if np.any(factor)]
        assert len(set(flat)) == len(flat)
    # Projections of equal shape, too, draw their own.
    up_and_gate = dataclasses.replace(model.adapter, targets=("up", "gate"))
    mlp = init_adapter(Decoder(model.config, up_and_gate), 0)["layers"]["mlp"]
    assert np.any(mlp["up"]["adapter"][drawn] != mlp["gate"]["adapter"][drawn])


@chains
def test_frozen_factors_and_base_stay_bitwise_and_have_no_optimizer_state(name):
    _, states, before, frozen = run(name)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    for step in range(1, STEPS + 1):
        if step % MERGE_EVERY == 0:
            continue
        buffers = [split_trained(states[at].adapter)[1] for at in (step - 1, step)]
        jax.tree.map(np.testing.assert_array_equal, *buffers)
    moments = next(part.mu for part in states[-1].optimizer if hasattr(part, "mu"))
    trained = split_trained(states[-1].adapter)[0]
    assert jax.tree.structure(moments) == jax.tree.structure(trained)
    assert not any("buffer" in str(path) for path, _ in jax.tree.leaves_with_path(moments))


@chains
def test_the_optimizer_restarts_with_each_stage_but_for_its_schedule(name):
    _, states, _, _ = run(name)
    for step, state in enumerate(states):
        adam = next(part for part in state.optimizer if hasattr(part, "mu"))
        assert adam.count == step % MERGE_EVERY
        is_fresh = not any(np.any(leaf) for leaf in jax.tree.leaves((adam.mu, adam.nu)))
        assert is_fresh == (step % MERGE_EVERY == 0)
        schedule = [
            part for part in state.optimizer if type(part).__name__.endswith("ScheduleState")
        ]
        assert [part.count for part in schedule] == [step]


@chains
def test_the_optimizer_may_go_on(name):
    config = dataclasses.replace(CHAINS[name], restart_optimizer=False)
    adapter = run(name)[1][0].adapter
    info = StepInfo(step=jnp.int32(MERGE_EVERY), num_steps=STEPS, key=jax.random.key(0))
    assert jax.eval_shape(lambda tree: config.after_step(tree, info), adapter)[1] is None


def test_layers_outside_an_xgblora_stage_do_not_move():
    _, states, _, _ = run("xgblora")
    moved = 0
    for place in PLACES:
        for step, state in enumerate(states):
            leaves = leaves_of(state, place)
            active = leaves["buffer_active"]
            assert sorted(active) == [0, 1, 1]
            adam = next(part for part in state.optimizer if hasattr(part, "mu"))
            mu = adam.mu["layers"][place[0]][place[1]]["adapter"]
            for layer in np.flatnonzero(active == 0):
                for leaf in (leaves["lora_a"], leaves["lora_b"], mu["lora_a"], mu["lora_b"]):
                    assert not np.any(leaf[layer])
            if step % MERGE_EVERY:
                for layer in np.flatnonzero(active):
                    assert np.any(leaves["lora_b"][layer])
                    moved += 1
    assert moved > 0
    # All projections train the same layers.
    chosen = [
        [tuple(leaves_of(states[step], place)["buffer_active"]) for place in PLACES]
        for step in (0, MERGE_EVERY, 2 * MERGE_EVERY)
    ]
    assert all(len(set(places)) == 1 for places in chosen)


@chains
def test_merged_kernels_are_base_sum_and_running_stage(name):
    model, states, _, frozen = run(name)
    merged = merge(model.adapter, merge_params(states[-1].adapter, frozen))
    for place in PLACES:
        leaves = leaves_of(states[-1], place)
        kernel = np.asarray(frozen["layers"][place[0]][place[1]]["kernel"], np.float64)
        expected = kernel + leaves["buffer_merged"] + product(model.adapter, leaves)
        got = merged["layers"][place[0]][place[1]]["kernel"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert np.any(product(model.adapter, leaves))


@pytest.mark.slow
@chains
def test_stacked_and_separate_layers_go_through_the_same_chain(name):
    """Starts and merges give the same values in both layouts; the step between them is drawn."""
    config = CHAINS[name]
    starts = {
        scanned: init_adapter(
            Decoder(decoder_config(num_layers=LAYERS, scan_layers=scanned), config), 7
        )
        for scanned in (True, False)
    }
    trees = {scanned: [by_projection(tree)] for scanned, tree in starts.items()}
    trained, buffers = split_trained(starts[True])
    stacked = merge_params(draw(trained, 1), buffers)
    apart = {
        f"layers_{layer}": jax.tree.map(lambda x, at=layer: x[at], stacked["layers"])
        for layer in range(LAYERS)
    }

    @jax.jit
    def after(tree, step):
        info = StepInfo(step=step, num_steps=STEPS, key=jax.random.key(step))
        return config.after_step(tree, info)

    for step in (MERGE_EVERY, MERGE_EVERY + 1):
        for scanned, tree in ((True, stacked), (False, apart)):
            new, restart = after(tree, jnp.int32(step))
            assert restart == (step == MERGE_EVERY)
            trees[scanned].append(by_projection(new))
    for one, other in zip(trees[True], trees[False], strict=True):
        assert len(other) == LAYERS * len(one)
        for path, leaves in other.items():
            layer = int(path[0].removeprefix("layers_"))
            expected = jax.tree.map(lambda x, at=layer: x[at], one["layers", *path[1:]])
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
                leaves,
                expected,
            )


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("name", ["xgblora", pytest.param("rac_right", marks=pytest.mark.slow)])
def test_killed_within_a_stage_and_resumed_it_ends_bitwise_the_same(name, tmp_path):
    """Merges are after steps 3 and 6, checkpoints after 2, 4, 6, 8: the run is cut in step 5 and goes on from 4."""
    config = CHAINS[name]
    if name == "xgblora":
        config = dataclasses.replace(config, num_layers_per_stage=1)
    config = dataclasses.replace(config, dropout_rate=0.3)
    experiment = dataclasses.replace(EXPERIMENT, adapter=config)

    def cut(step):
        if step == 5:
            raise PowerCutError

    unbroken = trainer(tmp_path / "unbroken", experiment=experiment, evaluate=None)
    assert unbroken.run() == "done"
    with pytest.raises(PowerCutError):
        trainer(tmp_path / "cut", Batches(cut), experiment, evaluate=None).run()
    resumed = trainer(tmp_path / "cut", experiment=experiment, evaluate=None)
    assert resumed.latest_step() == 4
    assert resumed.run() == "done"
    assert any(np.any(leaf) for leaf in jax.tree.leaves(split_trained(resumed.state.adapter)[1]))
    assert_same_run(
        tmp_path / "cut",
        resumed.state,
        (tmp_path / "unbroken", jax.device_get(unbroken.state)),
    )


def compiled_memory(adapter):
    """Memory of a compiled step with wide projections, without any array made, and the bytes of their kernels."""
    model = Decoder(decoder_config(num_layers=4, emb_dim=64, mlp_dim=1024), adapter)
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_train_step(model, optimizer, make_schedule(OPTIMIZER, 10), seed=0, num_steps=10)
    tokens = {"decoder_input_tokens": jnp.zeros((1, 2), jnp.int32)}
    adapter, frozen = split_params(shapes_of(model, tokens))
    moments = jax.eval_shape(optimizer.init, split_trained(adapter)[0])
    state = TrainState(step=jnp.int32(0), adapter=adapter, optimizer=moments)
    lowered = jax.jit(step, donate_argnums=0).lower(state, frozen, make_batch([(2,)], 2))
    kernels = sum(
        leaf.size * 4 for path, leaf in jax.tree.leaves_with_path(frozen) if "kernel" in str(path)
    )
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return lowered.compile().memory_analysis(), kernels, held


@pytest.mark.parametrize("name", ["xgblora", pytest.param("rac_right", marks=pytest.mark.slow)])
def test_a_step_holds_no_second_copy_of_the_sum(name):
    """It goes through the step in place: neither the scan, the backward pass nor a merge copies it."""
    adapter = dataclasses.replace(CHAINS[name], targets=("gate", "up", "down"))
    memory, kernels, held = compiled_memory(adapter)
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < 0.5 * kernels


@pytest.mark.parametrize("config", [XGBLoRAConfig, RACLoRAConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [("merge_every", 0), ("merge_every", 2.0), ("merge_every", True), ("restart_optimizer", 1)],
)
def test_wrong_fields_are_named(config, field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field}=.* is not allowed: "):
        config(**{field: value})


@pytest.mark.parametrize("config", [XGBLoRAConfig, RACLoRAConfig])
@pytest.mark.parametrize("field", ["merge_every", "restart_optimizer"])
def test_overrides_cannot_change_the_schedule(config, field):
    config(overrides={"q": {"rank": 3}})
    with pytest.raises(ConfigError, match=rf"adapter\.overrides\['q'\].*{field}"):
        config(overrides={"q": {field: getattr(config(), field)}})
