"""metrics.jsonl: whole lines, JSON that every reader takes, and what a kill may leave behind."""

import json
import math
import subprocess
import sys

import pytest

from sira_jax.training.logging import METRICS_FILE, MetricsLog, Progress, read_metrics


def raw_lines(directory):
    return (directory / METRICS_FILE).read_text().splitlines()


def test_lines_come_back(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"train/loss": 0.1 + 0.2, "train/tokens": 7})
    log.write(2, {"train/loss": 1e-30})
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 0.1 + 0.2, "train/tokens": 7.0},
        {"step": 2, "train/loss": 1e-30},
    ]
    assert len(raw_lines(tmp_path)) == 2


def test_what_is_no_finite_number_is_null(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (line,) = raw_lines(tmp_path)
    assert json.loads(line, parse_constant=refuse) == {
        "step": 3,
        "a": None,
        "b": None,
        "c": None,
        "d": 1.0,
    }


@pytest.mark.parametrize("cut", [1, 5, 11, 20])
def test_torn_last_line_is_left_out_and_removed(tmp_path, cut):
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in (1, 2):
        log.write(step, {"loss": float(step)})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "loss": 3.0}'[:cut])
    whole = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert read_metrics(tmp_path) == whole
    log = MetricsLog(tmp_path, start_step=2, tensorboard=False)
    log.write(3, {"loss": 3.0})
    assert [json.loads(line) for line in raw_lines(tmp_path)] == [*whole, {"step": 3, "loss": 3.0}]


def test_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    log = MetricsLog(tmp_path, start_step=2, tensorboard=False)
    log.write(3, {"loss": 3.0})
    assert [json.loads(line)["step"] for line in raw_lines(tmp_path)] == [1, 2, 3]


def test_resuming_removes_the_steps_that_are_run_again(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in (2, 4, 6, 8):
        log.write(step, {"loss": float(step)})
        log.write(step, {"validation/loss": float(step)})
    MetricsLog(tmp_path, start_step=5, tensorboard=False).write(6, {"loss": 0.5})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6]
    assert lines[-1] == {"step": 6, "loss": 0.5}


def test_starting_anew_starts_the_file_anew(tmp_path):
    MetricsLog(tmp_path, tensorboard=False).write(1, {"loss": 1.0})
    MetricsLog(tmp_path, tensorboard=False).write(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """In a process of its own, since it imports TensorFlow."""
    program = f"""
from pathlib import Path
from sira_jax.training.logging import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}))
log.write(5, {{"train/loss": 1.25}})
log.close()
import tensorflow as tf
events = [e for f in Path({str(tmp_path)!r}, "tensorboard").glob("*tfevents*")
          for e in tf.compat.v1.train.summary_iterator(str(f))]
print([(e.step, v.tag, float(tf.make_ndarray(v.tensor))) for e in events for v in e.summary.value])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[(5, 'train/loss', 1.25)]"


def test_progress_goes_to_standard_error(capsys):
    bar = Progress(4, initial=1, description="train")
    bar.update(loss=1.5, tokens=10)
    bar.update(loss=0.5, tokens=10, count=2)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "train" in err
    assert "4/4" in err
