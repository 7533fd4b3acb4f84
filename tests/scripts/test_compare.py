"""scripts/compare.py as a user calls it: two methods, two seeds, a few steps of a tiny model; and the report alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder
from tests.quick import QUICK_COMPILE, as_flags

REPO = Path(__file__).resolve().parents[2]


def compare(workdir, *arguments):
    return subprocess.run(
        [sys.executable, "scripts/compare.py", f"--workdir={workdir}", *arguments],
        cwd=REPO,
        env={**os.environ, "XLA_FLAGS": as_flags(QUICK_COMPILE), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    shape = {**TINY_LLAMA, "vocab_size": 384, "num_hidden_layers": 1}
    model = write_folder(tmp_path_factory.mktemp("model"), shape, weights_by_rule(shape))
    return (
        "--methods=lora,melora",
        f"--model={model}",
        "--task=cldr_number_en",
        "--seeds=0,1",
        "--budget=parameters",
        "--rank=2",
        "--num_steps=3",
        "--speed_rounds=3",
        "--config.data.vocabulary=bytes",
        "--config.data.sequence_length=64",
        "--config.data.batch_size=2",
        "--config.train.loss_chunk_size=0",
        "--config.optimizer.warmup_steps=0",
        "--config.evaluate.examples_per_task=2",
        "--config.evaluate.loss_examples_per_task=2",
        "--config.decode.max_new_tokens=4",
    )


@pytest.mark.slow
def test_a_whole_comparison(arguments, tmp_path):
    workdir = tmp_path / "out"
    done = compare(workdir, *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((workdir / "comparison.json").read_text())
    lora, melora = result["rows"]
    for row in (lora, melora):
        assert row["trained"] == lora["trained"]
        assert row["seeds"] == [0, 1]
        assert len(row["quality"]["loss"]["values"]) == 2
        assert row["quality"]["loss"]["half"] > 0
        assert all(value > 0 for value in row["costs"].values())
    assert (lora["costs"]["time_ratio"], lora["costs"]["memory_ratio"]) == (1, 1)
    summaries = [run["summary"] for run in result["runs"]]
    assert {summary["trained_parameters"] for summary in summaries} == {lora["trained"]}
    tokens = {(run["seed"], run["summary"]["tokens"]) for run in result["runs"]}
    assert len(tokens) == 2  # the same tokens for both methods, other ones for the other seed
    assert (workdir / "comparison.png").stat().st_size > 10_000
    assert "| melora |" in done.stdout

    # The report needs the directory alone, and says what it lacks.
    (workdir / "melora" / "seed1" / "evaluation_test.json").unlink()
    reported = compare(workdir, "--report_only")
    assert reported.returncode == 1
    assert "melora: seed 1: was not run yet" in reported.stdout


def test_mistakes_are_one_line(arguments, tmp_path):
    done = compare(tmp_path / "out", *arguments, "--methods=lora,nora")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --methods='nora' is not allowed: all, or some of none")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    done = compare(tmp_path / "out", "--config.train.num_stepz=3")
    assert done.returncode == 2
    assert "no such field; did you mean num_steps?" in done.stderr
