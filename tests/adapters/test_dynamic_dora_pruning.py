"""Dynamic-rank DoRA over a whole model: scores, pruning events and the final mask against a reference in plain loops."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import DynamicDoRAConfig, StepInfo, split_trained
from sira_jax.models import Decoder
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import TrainState, init_adapter, split_params
from sira_jax.training.train_step import make_train_step
from tests.adapters.mixtures import exact
from tests.tiny import decoder_config, decoder_params, make_batch

LAYERS = 3
SIZES = {"attention/q": (6, 4), "attention/v": (6, 3), "mlp/down": (5, 7)}


def fresh_tree(config, seed=0):
    """A stacked adapter tree with A, B and c drawn, and its buffers as they start."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (d_in, d_out) in SIZES.items():
        own = config.for_projection(name)
        if own is None:
            continue
        shapes = {"lora_a": (d_in, own.start_rank), "lora_b": (own.start_rank, d_out)}
        leaves = {
            key: rng.normal(size=(LAYERS, *shape)).astype(np.float32)
            for key, shape in shapes.items()
        }
        flat = (LAYERS, own.start_rank)
        leaves |= {
            "component_scale": rng.normal(size=flat).astype(np.float32),
            "buffer_score": np.zeros(flat, np.float32),
            "buffer_mask": np.ones(flat, np.float32),
        }
        module, projection = name.split("/")
        tree.setdefault(module, {})[projection] = {"adapter": leaves}
    return {"layers": tree}


def separate(tree):
    return {
        f"layers_{layer}": jax.tree.map(lambda x, at=layer: x[at], tree["layers"])
        for layer in range(LAYERS)
    }


def stacked(tree):
    return {
        "layers": jax.tree.map(
            lambda *x: np.stack(x), *(tree[f"layers_{layer}"] for layer in range(LAYERS))
        )
    }


def components(tree):
    """(layer, projection, index) -> where its c, score and mask are, in the order that breaks ties."""
    found = {}
    for number in range(LAYERS):
        for name in sorted(SIZES):
            module, projection = name.split("/")
            if projection in tree["layers"].get(module, {}):
                leaves = tree["layers"][module][projection]["adapter"]
                for index in range(leaves["component_scale"].shape[1]):
                    found[number, name, index] = (leaves, (number, index))
    return found


def reference_step(config, tree, scores, step, num_steps):
    """One step's end in float64, in place, on a stacked tree of float64 arrays; returns the components that were pruned."""
    last = max(1, math.ceil(Fraction(str(config.prune_end)) * num_steps))
    if step > last:
        return []
    places = components(tree)
    for key, (leaves, (number, index)) in places.items():
        c = leaves["component_scale"][number] * leaves["buffer_mask"][number]
        a, b = leaves["lora_a"][number], leaves["lora_b"][number]
        whole = np.linalg.norm(a @ np.diag(c) @ b)
        own = np.linalg.norm(np.outer(a[:, index], b[index]) * c[index])
        share = own / whole if whole else 0.0
        scores[key] = config.score_decay * scores[key] + (1 - config.score_decay) * share
    start = Fraction(str(config.prune_start)) * num_steps
    if step != last and (step % config.prune_every or step < start):
        return []
    budget = LAYERS * sum(own.rank for own in map(config.for_projection, SIZES) if own is not None)
    done = ((step - start) / (last - start)) ** 3 if step < last else 1
    count = math.floor(done * (len(places) - budget))
    pruned = sorted(places, key=lambda key: scores[key])[:count]
    for key in pruned:
        leaves, where = places[key]
        leaves["component_scale"][where] = 0
        if step == last:
            leaves["buffer_mask"][where] = 0
    return pruned


@functools.partial(jax.jit, static_argnums=(0, 3))
def after_step(config, tree, step, num_steps):
    info = StepInfo(step=step, num_steps=num_steps, key=jax.random.key(0))
    adapter, restart = config.after_step(tree, info)
    assert restart is None
    return adapter


CONFIGS = {
    "default": (DynamicDoRAConfig(rank=2, prune_every=3), 40),
    "another rank on a projection": (
        DynamicDoRAConfig(
            rank=3, prune_every=2, score_decay=0.5, overrides=(("v", {"rank": 1}),), targets=("q", "v")
        ),
        25,
    ),
    "fewer steps than prune_every": (DynamicDoRAConfig(rank=2, prune_end=0.55), 20),
    "one step": (DynamicDoRAConfig(rank=2), 1),
    "a window from the start to the end": (
        DynamicDoRAConfig(rank=2, prune_start=0.0, prune_end=1.0, prune_every=1), 9,
    ),
    "nothing to prune": (DynamicDoRAConfig(rank=2, start_rank_factor=1.0, prune_every=2), 12),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_scoring_and_pruning_of_a_whole_training(name):
    """Both layouts against the reference at every step, c moving at random between the steps as an optimizer moves it."""
    config, num_steps = CONFIGS[name]
    wanted = exact(fresh_tree(config))
    scores = dict.fromkeys(components(wanted), 0.0)
    trees = {"stacked": fresh_tree(config), "separate": separate(fresh_tree(config))}
    rng = np.random.default_rng(1)
    compiled = after_step._cache_size()
    total_pruned = []
    for step in range(1, num_steps + 1):
        for key in ("component_scale", "lora_a"):
            for _, leaves in sorted(_leaves(wanted).items()):
                leaves[key] += np.float32(0.1) * rng.normal(size=leaves[key].shape)
        rounded = jax.tree.map(lambda x: x.astype(np.float32), wanted)
        trees = {
            "stacked": _moved(trees["stacked"], rounded),
            "separate": separate(_moved(stacked(trees["separate"]), rounded)),
        }
        pruned = reference_step(config, wanted, scores, step, num_steps)
        total_pruned += pruned
        trees = {
            layout: jax.device_get(after_step(config, tree, np.int32(step), num_steps))
            for layout, tree in trees.items()
        }
        got = trees["stacked"]
        jax.tree.map(np.testing.assert_array_equal, stacked(trees["separate"]), got)
        for key, (leaves, where) in components(wanted).items():
            own, _ = components(got)[key]
            c = leaves["component_scale"][where]
            np.testing.assert_allclose(
                own["component_scale"][where], c, rtol=1e-6, err_msg=str(key)
            )
            np.testing.assert_allclose(
                own["buffer_score"][where], scores[key], rtol=1e-4, atol=1e-6
            )
            assert own["buffer_mask"][where] == leaves["buffer_mask"][where]
    assert after_step._cache_size() == compiled + 2, "a layout compiles once"
    kept = sum(leaves["buffer_mask"].sum() for leaves in _leaves(trees["stacked"]).values())
    budget = sum(own.rank for own in map(config.for_projection, SIZES) if own is not None)
    assert kept == LAYERS * budget
    assert bool(total_pruned) == (config.start_rank_factor > 1)


def _leaves(tree):
    return {
        (module, projection): value["adapter"]
        for module, projections in tree["layers"].items()
        for projection, value in projections.items()
    }


def _moved(tree, source):
    """The tree with the trained leaves of another, keeping its own buffers."""
    moved = jax.tree.map(np.copy, tree)
    for place, leaves in _leaves(moved).items():
        for key in ("lora_a", "component_scale"):
            leaves[key] = _leaves(source)[place][key]
    return moved


def test_events_come_by_their_steps_and_one_always_at_the_end_of_the_window():
    config = DynamicDoRAConfig()
    steps = [step for step, _ in config.pruning_events(1000)]
    assert steps == [200, 300, 400, 500]
    shares = [share for _, share in config.pruning_events(1000)]
    np.testing.assert_allclose(shares, [(5 / 35) ** 3, (15 / 35) ** 3, (25 / 35) ** 3, 1])
    assert config.pruning_events(2) == [(1, 1.0)]
    # 0.55 * 100 is a little over 55 in floating point.
    assert DynamicDoRAConfig(prune_end=0.55).pruning_events(100) == [(55, 1.0)]


def test_equal_scores_go_by_layer_then_projection_then_component():
    """With c all zero every score is 0, and the 9 that are too many are the first layer's."""
    config = DynamicDoRAConfig(rank=2)
    tree = fresh_tree(config)
    for leaves in _leaves(tree).values():
        leaves["component_scale"] = np.zeros_like(leaves["component_scale"])
    for layout in (lambda tree: tree, separate):
        got = jax.device_get(after_step(config, layout(tree), np.int32(5), 10))
        got = got if "layers" in got else stacked(got)
        masks = [leaves["buffer_mask"][where] for leaves, where in components(got).values()]
        assert masks == [0.0] * 9 + [1.0] * 18


def test_pruned_components_may_grow_again_until_the_final_mask():
    config = DynamicDoRAConfig(rank=2, prune_start=0.0, prune_every=4, score_decay=0.5)
    tree = fresh_tree(config)
    tree = jax.device_get(after_step(config, tree, np.int32(8), 20))
    zero = [
        place
        for place, (leaves, where) in components(tree).items()
        if not leaves["component_scale"][where]
    ]
    assert zero
    grown = jax.tree.map(np.copy, tree)
    for place in zero:
        leaves, where = components(grown)[place]
        assert leaves["buffer_mask"][where] == 1
        # By far the largest of their projections from now on.
        leaves["component_scale"][where] = 50.0
    for step in (9, 10):
        grown = jax.device_get(after_step(config, grown, np.int32(step), 20))
    for place in zero:
        leaves, where = components(grown)[place]
        assert leaves["buffer_mask"][where] == 1
    masks = [np.copy(leaves["buffer_mask"]) for leaves in _leaves(grown).values()]
    for leaves in _leaves(grown).values():
        leaves["component_scale"] = leaves["component_scale"] + 1.0
    later = jax.device_get(after_step(config, grown, np.int32(12), 20))
    for mask, leaves in zip(masks, _leaves(later).values(), strict=True):
        np.testing.assert_array_equal(leaves["buffer_mask"], mask)
    jax.tree.map(np.testing.assert_array_equal, later, grown)


def test_steps_without_an_event_do_not_sort():
    config = DynamicDoRAConfig(rank=2)
    jaxpr = jax.make_jaxpr(lambda tree, step: after_step(config, tree, step, 1000))(
        fresh_tree(config), np.int32(1)
    )

    def sorts(jaxpr, conditions):
        """Number of conditions around each sort."""
        found = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sort":
                found.append(conditions)
            inside = conditions + (equation.primitive.name == "cond")
            for inner in jax.core.jaxprs_in_params(equation.params):
                found += sorts(inner, inside)
        return found

    found = sorts(jaxpr.jaxpr, 0)
    assert found
    assert min(found) == 2


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_training_run_keeps_exactly_the_budget(scan_layers):
    num_steps = 8
    config = DynamicDoRAConfig(
        rank=2, prune_every=1, targets=("q", "down"), overrides=(("down", {"rank": 3}),)
    )
    model = Decoder(decoder_config(num_layers=2, scan_layers=scan_layers), config)
    options = OptimizerConfig(learning_rate=0.05)
    optimizer = make_optimizer(options, num_steps)
    step = jax.jit(
        make_train_step(
            model, optimizer, make_schedule(options, num_steps), seed=0, num_steps=num_steps
        )
    )
    adapter = init_adapter(model, 0)
    frozen = split_params(decoder_params(model))[1]
    state = TrainState(
        step=jnp.int32(0), adapter=adapter, optimizer=optimizer.init(split_trained(adapter)[0])
    )
    batch = make_batch([(5, 3), (7,)], 8)
    kept, penalties = [], []
    for _ in range(num_steps):
        state, metrics = step(state, frozen, batch)
        masks = jax.tree_util.tree_leaves_with_path(split_trained(state.adapter)[1])
        kept.append(sum(float(x.sum()) for path, x in masks if path[-1].key == "buffer_mask"))
        penalties.append(float(metrics["auxiliary_loss"]))
    start_rank, rank = 2 * (3 + 5), 2 * (2 + 3)
    assert kept == [start_rank] * 3 + [rank] * 5
    assert all(value > 0 for value in penalties[:4])
    assert penalties[4:] == [0.0] * 4
