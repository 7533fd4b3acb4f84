"""A tiny run through the loop: stopped in any way and resumed, it ends as one without a stop."""

import contextlib
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from sira_jax.errors import ConfigError, TrainingError
from sira_jax.training.logging import METRICS_FILE, read_metrics
from sira_jax.training.loop import CHECKPOINTS, CONFIG_FILE, make_checkpointer
from tests.training.tiny_run import FROZEN, STEPS, Batches, assert_same_run, changed, trainer

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_unbroken_run(unbroken):
    workdir, state = unbroken
    assert int(state.step) == STEPS
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [3, 5, 6, 8, 8]
    train_lines = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train_lines] == [3, 6, 8]
    assert [line["step"] for line in lines if "validation/loss" in line] == [5, 8]
    # Means over the steps since the last line: the learning rate shows which.
    peak, rates = 0.01, [0.0, 0.005]
    rates += [peak * (1 + np.cos(np.pi * i / (STEPS - 1 - 2))) / 2 for i in range(STEPS - 2)]
    for line, steps in zip(train_lines, (rates[:3], rates[3:6], rates[6:]), strict=True):
        np.testing.assert_allclose(line["train/learning_rate"], np.mean(steps), rtol=1e-5)
        assert line["train/tokens"] == 15
        assert line["speed/seconds_per_step"] > 0
    config = json.loads((workdir / CONFIG_FILE).read_text())
    assert config["config"]["train"]["num_steps"] == STEPS
    assert len(config["base_fingerprint"]) == 64


@pytest.mark.parametrize("stop_at", [1, 5])
def test_sigterm_saves_the_step_under_way_and_the_run_goes_on_from_it(tmp_path, unbroken, stop_at):
    def terminate(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stopped = trainer(tmp_path, Batches(terminate))
    assert stopped.run() == "SIGTERM"
    assert stopped.latest_step() == stop_at
    assert int(stopped.state.step) == stop_at
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = trainer(tmp_path)
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_ctrl_c_saves_too(tmp_path):
    def interrupt(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = trainer(tmp_path, Batches(interrupt))
    assert stopped.run() == "SIGINT"
    assert stopped.latest_step() == 3


def test_signal_in_the_last_step_is_a_finished_run(tmp_path, unbroken):
    def terminate(step):
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(tmp_path, Batches(terminate))
    assert run.run() == "done"
    assert_same_run(tmp_path, run.state, unbroken)


@pytest.mark.parametrize("crash_at", [2, 7])
def test_crash_loses_only_the_steps_since_the_checkpoint(tmp_path, unbroken, crash_at):
    class PowerCut(Exception):
        pass

    def crash(step):
        if step == crash_at:
            raise PowerCut

    with pytest.raises(PowerCut):
        trainer(tmp_path, Batches(crash)).run()
    # The crash may have torn the last line, and may have left lines of steps that are run again.
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "train/loss": 1.0}\n{"step": 9, "tr')
    resumed = trainer(tmp_path)
    assert resumed.latest_step() == {2: None, 7: 6}[crash_at]
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_finished_run_is_left_as_it_is(tmp_path, unbroken):
    shutil.copytree(unbroken[0], tmp_path / "run")

    def refuse(step):
        raise AssertionError("a step was run")

    again = trainer(tmp_path / "run", Batches(refuse))
    assert again.run() == "done"
    assert_same_run(tmp_path / "run", again.state, unbroken)


@pytest.mark.parametrize("what", ["weight", "base"])
def test_what_is_no_number_stops_the_run_and_spoils_nothing(tmp_path, unbroken, what):
    def poison(step, batch):
        if step == 4:
            batch["decoder_loss_weights"][0, 3] = np.nan
        return batch

    if what == "base":
        spoilt = jax.tree.map(np.array, FROZEN)
        spoilt["final_norm"]["scale"][0] = np.inf
        with pytest.raises(
            TrainingError, match=r"loss is nan at step 1; there is no checkpoint yet"
        ):
            trainer(tmp_path, frozen=spoilt).run()
        return
    with pytest.raises(TrainingError) as error:
        trainer(tmp_path, Batches(change=poison)).run()
    good = tmp_path / CHECKPOINTS / "2"
    assert str(error.value) == f"loss is nan at step 4; the last good checkpoint is {good}"
    assert all(np.isfinite(value) for line in read_metrics(tmp_path) for value in line.values())
    # With the data mended, the run ends as if nothing had been.
    resumed = trainer(tmp_path)
    assert resumed.latest_step() == 2
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_evaluation_that_is_no_number_stops_the_run(tmp_path):
    values = iter([1.0, float("nan")])
    run = trainer(tmp_path, evaluate=lambda _: {"validation/loss": next(values)})
    good = tmp_path / CHECKPOINTS / "6"
    with pytest.raises(TrainingError, match=rf"validation/loss is nan at step 8; .* {good}$"):
        run.run()
    assert run.latest_step() == 6


@pytest.mark.parametrize(
    ("mode", "best", "kept"), [("min", 3, [3, 8]), ("max", 5, [5, 8]), ("off", None, [8])]
)
def test_best_and_newest_are_kept(tmp_path, mode, best, kept):
    values = iter([0.5, 0.4, 0.1, 0.3, 0.9, 0.2, 0.8, 0.6])
    options = {"keep_best": ""} if mode == "off" else {"best_mode": mode}
    experiment = changed("train", eval_every=1, keep_checkpoints=1, **options)
    run = trainer(
        tmp_path, experiment=experiment, evaluate=lambda _: {"validation/loss": next(values)}
    )
    assert run.run() == "done"
    checkpointer = make_checkpointer(tmp_path, experiment)
    assert checkpointer.best_step() == best
    assert checkpointer.all_steps() == kept
    checkpointer.close()


def test_evaluation_without_the_kept_metric_loses_no_step(tmp_path):
    experiment = changed("train", checkpoint_every=100, keep_best="validation/bleu")
    with contextlib.suppress(ConfigError, TrainingError):
        trainer(tmp_path, experiment=experiment).run()
    checkpointer = make_checkpointer(tmp_path, experiment)
    assert checkpointer.latest_step() == STEPS
    checkpointer.close()


def test_run_without_evaluation(tmp_path):
    run = trainer(tmp_path, evaluate=None)
    assert run.run() == "done"
    assert not any("validation/loss" in line for line in read_metrics(tmp_path))
    assert run.latest_step() == STEPS
