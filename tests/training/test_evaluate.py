"""Evaluation per task against plain sums, and the report on routers for both layouts of layers."""

import functools

import jax
import numpy as np
import pytest

from sira_jax.adapters import SiRAConfig
from sira_jax.models import Decoder
from sira_jax.training.evaluate import LossEvaluator, router_report
from sira_jax.training.train_state import merge_params, split_params
from tests.tiny import decoder_config, decoder_params, make_batch

SIRA = SiRAConfig(
    expert_dropout_rate=0.0,
    num_experts=4,
    num_selected_experts=2,
    rank=2,
    eval_capacity_factor=0.5,
    min_capacity=1,
    router_init_std=1.0,
    targets=("v", "down"),
)
TASKS = ("first", "second", "empty")
# Batches of unequal numbers of targets: a mean of the batches' means would be another number.
BATCHES = [
    make_batch([(8,), (5, 3)], 8, seed=1, num_tasks=2),
    make_batch([(4,), ()], 8, seed=5, num_tasks=2),
    make_batch([(), ()], 8, seed=3),
]


@pytest.fixture(scope="module")
def model():
    return Decoder(decoder_config(), SIRA, num_tasks=len(TASKS))


@pytest.fixture(scope="module")
def trees(model):
    return split_params(decoder_params(model))


@pytest.fixture(scope="module")
def evaluated(model, trees):
    return LossEvaluator(model, trees[1], BATCHES, TASKS, prefix="held_out").run(trees[0])


def plain_sums(model, params):
    """Task -> (nats, hits, targets), position by position."""
    sums = {task: np.zeros(3) for task in range(len(TASKS))}
    apply = jax.jit(model.apply)
    for batch in BATCHES:
        logits = np.asarray(apply({"params": params}, batch), np.float64)
        for index in np.ndindex(2, 8):
            if batch["decoder_loss_weights"][index] == 0:
                continue
            row, target = logits[index], batch["decoder_target_tokens"][index]
            nats = np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            sums[batch["task_ids"][index]] += [nats, row.argmax() == target, 1]
    return sums


def test_losses_are_the_plain_means(model, trees, evaluated):
    metrics, _ = evaluated
    sums = plain_sums(model, merge_params(*trees))
    assert sums[0][2] > 0
    assert sums[1][2] > 0
    nats, hits, targets = sum(sums.values())
    expected = {"held_out/loss": nats / targets, "held_out/accuracy": hits / targets}
    for task in (0, 1):
        nats, hits, targets = sums[task]
        expected[f"held_out/loss/{TASKS[task]}"] = nats / targets
        expected[f"held_out/accuracy/{TASKS[task]}"] = hits / targets
    # A task without a target has no loss rather than one of 0.
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert isinstance(metrics[name], float)
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_chunks_and_call_give_the_same(model, trees, evaluated):
    chunked = LossEvaluator(model, trees[1], BATCHES, TASKS, prefix="held_out", loss_chunk_size=5)
    metrics = chunked(trees[0])
    assert metrics.keys() == evaluated[0].keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, evaluated[0][name], rtol=1e-5)


def test_one_task_is_not_listed_apart():
    model = Decoder(decoder_config())
    batches = [make_batch([(8,)], 8)]
    evaluator = LossEvaluator(model, decoder_params(model), batches, ["only"])
    metrics, report = evaluator.run({})
    assert set(metrics) == {"validation/loss", "validation/accuracy"}
    assert report == {}


def test_nothing_to_evaluate_gives_no_metrics(model, trees):
    assert LossEvaluator(model, trees[1], [], TASKS).run(trees[0]) == ({}, {})


def test_report_sums_over_batches(model, trees, evaluated):
    _, report = evaluated
    assert report["tasks"] == list(TASKS)
    assert set(report["projections"]) == {"attention/v", "mlp/down"}
    params = merge_params(*trees)
    observe = jax.jit(functools.partial(model.apply, mutable=["metrics"]))
    for projection, fields in report["projections"].items():
        shapes = {name: np.shape(value) for name, value in fields.items()}
        assert shapes == {
            "expert_load": (2, 4),
            "dropped_share": (2,),
            "gate_entropy": (2,),
            "router_confidence": (2,),
            "task_expert_load": (2, 3, 4),
            "task_gate_entropy": (2, 3),
            "task_tokens": (2, 3),
        }
        np.testing.assert_allclose(np.sum(fields["expert_load"], axis=-1), 1, rtol=1e-5)
        assert min(fields["dropped_share"]) > 0
        module, name = projection.split("/")
        totals = np.zeros((2, 3))
        for batch in BATCHES:
            _, sown = observe({"params": params}, batch)
            stats = sown["metrics"]["layers"][module][name]["adapter"]["router"][0]
            totals += np.stack([stats.tokens, stats.entropy_sum, stats.dropped_pairs], axis=1)
        tokens, entropy, dropped = totals.T
        np.testing.assert_allclose(np.sum(fields["task_tokens"], axis=-1), tokens)
        np.testing.assert_allclose(fields["gate_entropy"], entropy / tokens, rtol=1e-5)
        np.testing.assert_allclose(fields["dropped_share"], dropped / (2 * tokens), rtol=1e-5)


def test_report_is_the_same_for_layers_apart(trees, evaluated):
    model = Decoder(decoder_config(scan_layers=False), SIRA, num_tasks=len(TASKS))

    def apart(tree):
        rest = {name: value for name, value in tree.items() if name != "layers"}
        return rest | {
            f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(2)
        }

    adapter, frozen = (apart(tree) for tree in trees)
    metrics, report = LossEvaluator(model, frozen, BATCHES, TASKS, prefix="held_out").run(adapter)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, evaluated[0][name], rtol=1e-5)
    assert report["projections"].keys() == evaluated[1]["projections"].keys()
    for projection, fields in report["projections"].items():
        for name, value in fields.items():
            other = evaluated[1]["projections"][projection][name]
            np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-6)


def test_report_orders_ten_layers_by_number():
    """layers_10 comes after layers_9, not after layers_1."""
    model = Decoder(decoder_config(scan_layers=False, num_layers=11), SIRA)
    batch = make_batch([(4,)], 4)
    shapes = jax.eval_shape(
        lambda: model.apply({"params": decoder_params(model)}, batch, mutable=["metrics"])
    )[1]["metrics"]
    sown = jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), shapes)
    for layer in range(11):
        stats = sown[f"layers_{layer}"]["mlp"]["down"]["adapter"]["router"]
        sown[f"layers_{layer}"]["mlp"]["down"]["adapter"]["router"] = (
            stats[0].replace(tokens=np.float32(1), entropy_sum=np.float32(layer)),
        )
    report = router_report(sown, ["task"])
    assert report["projections"]["mlp/down"]["gate_entropy"] == list(range(11))
