"""Which runs are done, skipped, resumed and repeated, with scripts that only write results."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts.compare_runs import Runner, Stopped, load_plan, save_plan, seed_major
from sira_jax.errors import CheckpointError, DataError
from tests.scripts.comparisons import experiment, specs, use_fakes


def run_all(by_method, workdir):
    order = seed_major(by_method)
    with Runner(order, workdir / "cache") as runner:
        for spec in order:
            runner.run(spec)


def calls(file):
    return file.read_text().splitlines()


def test_all_methods_come_before_the_second_seed(tmp_path, monkeypatch, capsys):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    by_method = specs(tmp_path, ("none", "lora", "sira"))
    run_all(by_method, tmp_path)
    assert calls(file) == [
        "evaluate none seed0",
        "train lora seed0",
        "evaluate lora seed0",
        "train sira seed0",
        "evaluate sira seed0",
        "train lora seed1",
        "evaluate lora seed1",
        "train sira seed1",
        "evaluate sira seed1",
    ]
    assert all(spec.failure() is None for spec in seed_major(by_method))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("[5/5] sira seed 1: done after")
    assert lines[-1].endswith("about 0 s left")


def test_finished_runs_are_skipped(tmp_path, monkeypatch, capsys):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    by_method = specs(tmp_path)
    run_all(by_method, tmp_path)
    file.write_text("")
    run_all(by_method, tmp_path)
    assert calls(file) == []
    assert "[1/4] lora seed 0: done before" in capsys.readouterr().out


def test_what_is_missing_is_done_and_no_more(tmp_path, monkeypatch):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    by_method = specs(tmp_path)
    run_all(by_method, tmp_path)
    by_method["lora"][0].evaluation_file.unlink()
    (by_method["sira"][1].directory / "summary.json").unlink()
    file.write_text("")
    run_all(by_method, tmp_path)
    assert calls(file) == ["evaluate lora seed0", "train sira seed1", "evaluate sira seed1"]


def test_another_evaluation_evaluates_again(tmp_path, monkeypatch):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    run_all(specs(tmp_path, seeds=(0,)), tmp_path)
    file.write_text("")
    changed = specs(tmp_path, seeds=(0,), evaluate={"examples_per_task": 5})
    for spec in seed_major(changed):
        spec.check_resumable()
    run_all(changed, tmp_path)
    assert calls(file) == ["evaluate lora seed0", "evaluate sira seed0"]
    saved = json.loads(changed["lora"][0].evaluation_file.read_text())
    assert saved["experiment"]["evaluate"]["examples_per_task"] == 5


def test_another_training_is_refused(tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes")
    run_all(specs(tmp_path, seeds=(0,)), tmp_path)
    (other,) = specs(tmp_path, ("lora",), (0,), optimizer={"learning_rate": 0.5})["lora"]
    assert not other.is_done()
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate=0\.001"):
        other.check_resumable()
    # Where nothing was saved, nothing stands in the way.
    (other.directory / "checkpoints" / "4").rmdir()
    other.check_resumable()


def test_a_failure_is_kept_and_tried_again(tmp_path, monkeypatch, capsys):
    file = use_fakes(monkeypatch, tmp_path / "fakes", "fail train sira")
    by_method = specs(tmp_path)
    run_all(by_method, tmp_path)
    reason = "train.py ended with status 1: error: no luck today"
    assert by_method["sira"][0].failure() == reason
    assert by_method["lora"][1].failure() is None
    assert f"sira seed 0: FAILED ({reason})" in capsys.readouterr().out
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    run_all(by_method, tmp_path)
    assert calls(file)[0] == "train sira seed0"
    assert by_method["sira"][0].failure() is None
    assert not (by_method["sira"][0].directory / "failure.json").exists()


def test_a_killed_process_is_a_failure(tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes")
    (tmp_path / "fakes" / "train.py").write_text("import os\nos.kill(os.getpid(), 9)")
    by_method = specs(tmp_path, ("lora",), (0,))
    run_all(by_method, tmp_path)
    assert by_method["lora"][0].failure().startswith("train.py ended with SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_training_after_it_has_saved(tmp_path, monkeypatch, number):
    use_fakes(monkeypatch, tmp_path / "fakes", "wait train lora")
    by_method = specs(tmp_path)
    directory = by_method["lora"][0].directory

    def send():
        while not (directory / "waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped):
        run_all(by_method, tmp_path)
    thread.join()
    assert (directory / "saved").exists()
    assert signal.getsignal(number) == before
    assert by_method["sira"][0].failure() == "was not run yet"


def test_plans_come_back_as_they_were(tmp_path):
    by_method = specs(tmp_path, ("none", "lora", "sira"))
    save_plan(tmp_path, {"rank": 4}, by_method)
    assert load_plan(tmp_path) == ({"rank": 4}, by_method)
    (tmp_path / "plan.json").write_text('{"runs": {"lora": [[0, {}]]}}')
    with pytest.raises(DataError, match=r"plan\.json: is damaged or of another version"):
        load_plan(tmp_path)


def test_an_evaluation_of_another_version_is_not_done(tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes")
    (spec,) = specs(tmp_path, ("lora",), (0,))["lora"]
    run_all({"lora": [spec]}, tmp_path)
    assert spec.is_done()
    saved = json.loads(spec.evaluation_file.read_text())
    saved["experiment"]["adapter"]["no_such_field"] = 1
    spec.evaluation_file.write_text(json.dumps(saved))
    assert not spec.is_done()
    assert not dataclasses.replace(spec, experiment=experiment("lora", 3)).is_done()
    spec.evaluation_file.write_text("{")
    assert not spec.is_done()


REPO = Path(__file__).resolve().parents[2]


def test_the_command_line_ends_with_one_line():
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", "--workdir=/nowhere/at/all", "--report_only"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere/at/all/plan.json: there is no comparison")
    assert len(done.stderr.splitlines()) == 1
