"""Failing and slow sources of batches, in the loop."""

import time
import types

import pytest

from sira_jax.errors import DataError
from sira_jax.training import logging, patient_source, window
from sira_jax.training.patient_source import ATTEMPTS, PatientSource
from tests.training.tiny_run import Batches, assert_same_run, trainer

pytestmark = pytest.mark.usefixtures("compiled_once")


class Failing(Batches):
    """Fails with an OSError `times` times at one step, after it has moved on."""

    def __init__(self, step, times):
        super().__init__()
        self.step, self.left = step, times

    def next_batch(self):
        batch = super().next_batch()
        if self.position == self.step and self.left:
            self.left -= 1
            self.position += 7
            raise OSError(5, "Input/output error")
        return batch


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses, which take no time here."""
    pauses = []
    clock = types.SimpleNamespace(sleep=pauses.append, perf_counter=time.perf_counter)
    monkeypatch.setattr(patient_source, "time", clock)
    return pauses


def test_a_source_that_recovers_changes_nothing(tmp_path, unbroken):
    run = trainer(tmp_path, Failing(step=3, times=ATTEMPTS - 1))
    assert run.run() == "done"
    assert_same_run(tmp_path, run.state, unbroken)


def test_a_source_that_stays_broken_ends_the_run_with_one_line(tmp_path, unbroken):
    run = trainer(tmp_path, Failing(step=5, times=ATTEMPTS))
    with pytest.raises(DataError) as error:
        run.run()
    assert str(error.value) == (
        f"the next batch cannot be read in {ATTEMPTS} attempts: [Errno 5] Input/output error"
    )
    resumed = trainer(tmp_path)
    assert resumed.latest_step() == 4
    assert resumed.run() == "done"
    assert_same_run(tmp_path, resumed.state, unbroken)


def test_a_mistake_in_the_source_is_not_tried_again():
    class Wrong(Batches):
        calls = 0

        def next_batch(self):
            self.calls += 1
            raise KeyError("tokens")

    source = Wrong()
    with pytest.raises(KeyError):
        PatientSource(source).next_batch()
    assert source.calls == 1


def test_pauses_double(pauses):
    PatientSource(Failing(step=1, times=ATTEMPTS - 1), pause=0.5).next_batch()
    assert pauses == [0.5 * 2**n for n in range(ATTEMPTS - 1)]


@pytest.mark.parametrize(("wait", "share"), [(3.0, 0.75), (0.0, 0.0)])
def test_a_slow_source_shows_in_the_log_and_on_the_bar(tmp_path, monkeypatch, capsys, wait, share):
    """By a clock that only the source and the step move: a second a step."""
    now = [0.0]
    for module in (patient_source, window, logging):
        clock = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=None)
        monkeypatch.setattr(module, "time", clock)

    def move(seconds):
        now[0] += seconds

    run = trainer(tmp_path, Batches(lambda step: move(wait)))
    step = run._step
    run._step = lambda *arguments: [step(*arguments), move(1.0)][0]
    assert run.run() == "done"
    lines = [line for line in logging.read_metrics(tmp_path) if "train/loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["speed/data_wait_share"] == share
        assert line["speed/seconds_per_step"] == 1 + wait
    assert ("waiting for data=75%" in capsys.readouterr().err) == (share > 0)
