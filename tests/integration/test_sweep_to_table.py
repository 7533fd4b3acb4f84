"""From a sweep file to a table, with the real scripts on a tiny model, by two workers; and the analysis of a run."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf_models import weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE

ROOT = Path(__file__).parents[2]
CONFIG = """
from configs import base
from configs.experiments.compare import adapter_of

def get_config(method):
    config = base.get_config()
    config.adapter = adapter_of(method)
    config.model.path = {model!r}
    config.data.tasks = ("cldr_number_en", "cldr_relative_sw")
    config.data.vocabulary = "bytes"
    config.data.sequence_length = 128
    config.data.batch_size = 4
    config.train.num_steps = 2
    config.train.log_every = 1
    config.evaluate.examples_per_task = 3
    config.evaluate.loss_examples_per_task = 3
    config.decode.max_new_tokens = 4
    return config
"""
SWEEP = """
def get_sweep():
    return [
        {{"config": "{config}:" + method, "name": method}} for method in ("none", "lora", "sira")
    ]
"""


def run(script, *arguments):
    command = [sys.executable, f"scripts/{script}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_sweep_becomes_a_table(tmp_path):
    shape = {**SHAPE, "num_hidden_layers": 2}
    write_folder(tmp_path / "model", shape, weights_by_rule(shape))
    (tmp_path / "tiny.py").write_text(CONFIG.format(model=str(tmp_path / "model")))
    (tmp_path / "sweep.py").write_text(SWEEP.format(config=tmp_path / "tiny.py"))
    sweep, workdir = f"--sweep={tmp_path / 'sweep.py'}", f"--workdir={tmp_path / 'runs'}"
    done = run("sweep", sweep, workdir, "--workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 runs: 3 done" in done.stdout
    with (tmp_path / "runs" / "results.csv").open() as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert all(float(line["test/loss"]) > 0 for line in lines.values())
    assert {line["attempts"] for line in lines.values()} == {"1"}
    again = run("sweep", workdir)
    assert again.returncode == 0
    assert "log in" not in again.stdout
    out = tmp_path / "tables"
    done = run("make_tables", "--kind=multitask", f"--runs={tmp_path / 'runs'}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "| sira" in done.stdout
    assert (out / "multitask.html").exists()
    done = run("analyze_router", f"--workdir={tmp_path / 'runs' / 'sira'}", "--shuffles=2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "sira" / "routers" / "training.png").exists()
    mistake = run("sweep", "--sweep=nowhere.py", workdir)
    assert mistake.returncode == 2
    assert mistake.stderr == "error: --sweep=nowhere.py: no such file\n"
