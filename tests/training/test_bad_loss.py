"""Which losses are bad, what the step does with one, and what the loop does."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from sira_jax.checkpoints.orbax import whole_steps
from sira_jax.errors import TrainingError
from sira_jax.training import bad_loss
from sira_jax.training.bad_loss import BadLossConfig, Judge
from sira_jax.training.logging import read_metrics
from sira_jax.training.loop import CHECKPOINTS, make_checkpointer
from tests.quick import run_on_devices
from tests.training.tiny_run import (
    EXPERIMENT,
    STEPS,
    Batches,
    assert_same_run,
    changed,
    trainer,
)

pytestmark = pytest.mark.usefixtures("compiled_once")
NAN, INFINITY = float("nan"), float("inf")
GOOD = {"loss": 1.0, "gradient_norm": 1.0, "auxiliary_loss": 0.0, "parameter_norm": 1.0}


def judged(config, losses):
    """Whether each loss is bad, by the judge; bad ones are not remembered."""
    judge, bad = Judge(config), []
    for loss in losses:
        # As if saved and resumed between any two steps.
        judge = Judge(config, judge.state())
        bad.append(judge.problem(GOOD | {"loss": loss}) is not None)
        if not bad[-1]:
            judge.accept(loss)
    return bad


def test_a_spike_is_a_multiple_of_the_median_of_the_last_good_losses():
    random = np.random.default_rng(0)
    losses = np.float32(random.lognormal(0, 1.0, 300)).astype(float)
    losses[[40, 41, 90]] = NAN, INFINITY, -INFINITY
    good, expected = [], []
    for loss in losses:
        limit = 3 * np.median(good[-7:]) if len(good) >= 7 else np.inf
        expected.append(not (np.isfinite(loss) and loss <= np.float32(limit)))
        if not expected[-1]:
            good.append(loss)
    config = BadLossConfig(action="skip", spike_factor=3, window=7)
    assert judged(config, losses) == expected
    assert 10 < sum(expected) < 150


@pytest.mark.parametrize("name", bad_loss.MUST_BE_FINITE)
@pytest.mark.parametrize("value", [NAN, INFINITY, 0.5])
def test_the_step_and_the_judge_agree(name, value):
    metrics = GOOD | {name: value}
    judge = Judge(BadLossConfig())
    assert bool(bad_loss.is_bad(metrics, judge.limit())) == (judge.problem(metrics) is not None)
    assert (judge.problem(metrics) is None) == np.isfinite(value)
    spiky = Judge(BadLossConfig(spike_factor=2, window=1), {"losses": [1.5], "bad": 0})
    for loss in (3.0, np.nextafter(np.float32(3), np.float32(4))):
        metrics = GOOD | {"loss": float(loss)}
        assert bool(bad_loss.is_bad(metrics, spiky.limit())) == (loss > 3)
        assert (spiky.problem(metrics) is not None) == (loss > 3)
    assert "2 times the median of the last 1" in spiky.problem(metrics)


def poisoned(*bad, before=lambda step: None):
    """Batches of which those of the given steps have a weight that is no number."""

    def change(step, batch):
        if step in bad:
            batch["decoder_loss_weights"][0, 3] = NAN
        return batch

    return Batches(before, change)


def policy(action, **fields):
    return changed("bad_loss", action=action, **fields)


def test_a_skipped_step_changes_only_the_schedule(tmp_path):
    """The run that skips batch 4 has the adapter and the moments of step 3 after it."""
    data = poisoned(4)
    run = trainer(tmp_path, data, experiment=policy("skip"))
    states = {}
    step = run._step

    def watched(state, frozen, batch, limit):
        state, metrics = step(state, frozen, batch, limit)
        states[int(state.step)] = jax.device_get(state)
        return state, metrics

    run._step = watched
    assert run.run() == "done"
    jax.tree.map(np.testing.assert_array_equal, states[4].adapter, states[3].adapter)
    different = 0
    for old, new in zip(
        jax.tree.leaves(states[3].optimizer), jax.tree.leaves(states[4].optimizer), strict=True
    ):
        if not np.array_equal(old, new):
            # The schedule's own count.
            assert (old, new) == (3, 4)
            different += 1
    assert different == 1
    assert not np.array_equal(
        jax.tree.leaves(states[5].adapter)[0], jax.tree.leaves(states[4].adapter)[0]
    )
    line = next(line for line in read_metrics(tmp_path) if line["step"] == 6)
    assert line["train/skipped"] == pytest.approx(1 / 3)
    assert all(np.isfinite(x) for line in read_metrics(tmp_path) for x in line.values())


@pytest.mark.parametrize("accumulation_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_without_a_bad_step_skipping_is_the_run_without(tmp_path, accumulation_steps):
    results = []
    for name, action in (("off", "stop"), ("on", "skip")):
        experiment = changed("train", accumulation_steps=accumulation_steps, num_steps=3)
        policies = BadLossConfig(action=action, spike_factor=50, window=1)
        experiment = dataclasses.replace(experiment, bad_loss=policies)
        run = trainer(tmp_path / name, experiment=experiment)
        assert run.run() == "done"
        results.append(jax.device_get(run.state))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), *results)


def test_the_step_is_the_same_unless_it_may_skip(tmp_path):
    texts = []
    for number, experiment in enumerate(
        (
            EXPERIMENT,
            policy("stop", spike_factor=3, window=5),
            policy("rewind", spike_factor=3),
            policy("skip"),
        )
    ):
        run = trainer(tmp_path / str(number), experiment=experiment)
        batch = run._layout.put(Batches().next_batch())
        limit = (run._judge.limit(),) if experiment.bad_loss.action == "skip" else ()
        texts.append(run._step.lower(run.state, run._frozen, batch, *limit).as_text())
    assert texts[0] == texts[1] == texts[2] != texts[3]


def stop_at(step):
    def before(now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return before


class PowerCut(Exception):
    pass


def cut_at(step):
    def before(now):
        if now == step:
            raise PowerCut

    return before


def broken_off(workdir, experiment, bad, before):
    """A run that ends at `before` and is started again."""
    try:
        outcome = trainer(workdir, poisoned(*bad, before=before), experiment=experiment).run()
        assert outcome == "SIGTERM"
    except PowerCut:
        pass
    resumed = trainer(workdir, poisoned(*bad), experiment=experiment)
    assert resumed.run() == "done"
    return resumed.state


@pytest.mark.parametrize(
    ("action", "fields", "bad"),
    [
        ("skip", {}, (4, 7)),
        ("rewind", {}, (4, 9)),
        pytest.param(
            "rewind",
            {"spike_factor": 1.15, "window": 2, "patience": 20},
            (),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_with_bad_losses_that_is_stopped_ends_as_one_that_is_not(
    tmp_path, action, fields, bad
):
    experiment = policy(action, **fields)
    run = trainer(tmp_path / "whole", poisoned(*bad), experiment=experiment)
    assert run.run() == "done"
    if action == "rewind":
        assert run._data.state()["position"] > STEPS
    whole = tmp_path / "whole", jax.device_get(run.state)
    for name, before in {"cut": cut_at(6), "stopped": stop_at(3)}.items():
        state = broken_off(tmp_path / name, experiment, bad, before)
        assert_same_run(tmp_path / name, state, whole)


def test_a_rewind_goes_on_from_the_checkpoint_with_later_batches(tmp_path, capsys):
    """Batch 5 is bad: back to step 4 of checkpoints at even steps, whose step 5 then has batch 6."""
    run = trainer(tmp_path / "rewound", poisoned(5), experiment=policy("rewind"))
    assert run.run() == "done"
    warning = "warning: loss is nan at step 5: back to step 4, and on with the batches that follow"
    assert warning in capsys.readouterr().err

    class Without5(Batches):
        def next_batch(self):
            if self.position == 4:
                self.position = 5
            return super().next_batch()

    other = trainer(tmp_path / "without", Without5(), experiment=policy("rewind"))
    assert other.run() == "done"
    assert_same_run(tmp_path / "rewound", run.state, (tmp_path / "without", other.state))


def test_before_the_first_checkpoint_a_rewind_goes_to_the_beginning(tmp_path):
    run = trainer(tmp_path / "rewound", poisoned(1, 3), experiment=policy("rewind"))
    assert run.run() == "done"
    late = Batches()
    late.position = 3
    other = trainer(tmp_path / "late", late, experiment=policy("rewind"))
    assert other.run() == "done"
    jax.tree.map(np.testing.assert_array_equal, run.state, other.state)


def test_checkpoints_of_the_way_that_was_given_up_are_gone(tmp_path):
    """The evaluation at step 5 saves; batch 6 is bad, and the run goes back to 4."""
    seen = []
    experiment = policy("rewind")

    def look(step):
        if step == 7:
            seen.extend(whole_steps(tmp_path / CHECKPOINTS))

    run = trainer(tmp_path, poisoned(6, before=look), experiment=experiment)
    assert run.run() == "done"
    assert seen == [2, 4]
    checkpointer = make_checkpointer(tmp_path, experiment)
    assert checkpointer.all_steps() == [2, 4, 5, 6, 8]
    checkpointer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 5, 6, 8, 8]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("skip", "after 2 bad steps in a row"),
        ("rewind", "after 2 rewinds to one checkpoint"),
    ],
)
def test_patience_ends(tmp_path, action, words):
    bad = range(5, 100)
    with pytest.raises(TrainingError) as error:
        trainer(tmp_path, poisoned(*bad), experiment=policy(action, patience=2)).run()
    assert (
        str(error.value)
        == f"loss is nan at step {7 if action == 'skip' else 5}, {words} (bad_loss.patience)"
    )
    # Apart, as many are allowed as come.
    bad = (2, 3, 5, 6, 8) if action == "skip" else (3, 4, 7, 8, 11, 12)
    run = trainer(tmp_path / "apart", poisoned(*bad), experiment=policy(action, patience=2))
    assert run.run() == "done"


def test_a_stop_at_a_spike_names_it(tmp_path):
    experiment = policy("stop", spike_factor=1.001, window=1)
    with pytest.raises(TrainingError, match=r"^loss is \d+\.\d+, over 1\.001 times the median"):
        trainer(tmp_path, experiment=experiment).run()


def test_the_policy_may_change_when_a_run_goes_on(tmp_path):
    with pytest.raises(TrainingError):
        trainer(tmp_path, poisoned(5)).run()
    run = trainer(tmp_path, poisoned(5), experiment=policy("rewind"))
    assert run.run() == "done"


def test_a_damaged_checkpoint_is_no_goal_of_a_rewind(tmp_path, capsys):
    def damage(step):
        if step == 5:
            (tmp_path / CHECKPOINTS / "4" / "adapter" / "manifest.ocdbt").write_bytes(b"")

    run = trainer(tmp_path, poisoned(5, before=damage), experiment=policy("rewind"))
    assert run.run() == "done"
    err = capsys.readouterr().err
    assert "4 is damaged: adapter/manifest.ocdbt has changed" in err
    assert "back to step 2" in err


@pytest.mark.slow
def test_on_a_mesh_it_is_the_run_of_one_device(tmp_path):
    printed = run_on_devices("tests.training.bad_loss_devices", tmp_path)
    for result in json.loads(printed.splitlines()[-1]).values():
        assert result["devices"] == 8
        assert result["resumed_is_equal"]
        # AdamW turns rounding of small gradients into whole steps: that much, and not more.
        assert result["difference"] < 1e-3 * result["size"]
