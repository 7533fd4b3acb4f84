"""Train, kill, resume, evaluate and generate, through the scripts as a user calls them, on a tiny model made here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sira_jax.training.logging import read_metrics
from tests.finished_runs import assert_same_run, steps
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder

REPO = Path(__file__).resolve().parents[2]
STEPS = 30

CONFIG = """
from configs import base
from configs.adapters import sira


def get_config():
    config = base.get_config()
    config.model.path = {model!r}
    config.adapter = sira.get_config(
        rank=2, num_experts=4, num_selected_experts=2, expert_dropout_rate=0.2, dropout_rate=0.1
    )
    config.data.tasks = ("cldr_number_en", "cldr_relative_sw")
    config.data.vocabulary = "bytes"
    config.data.sequence_length = 128
    config.data.batch_size = 4
    config.train.num_steps = {steps}
    config.train.log_every = 4
    config.train.eval_every = 10
    config.train.checkpoint_every = 3
    config.optimizer.learning_rate = 0.01
    config.evaluate.loss_examples_per_task = 4
    config.evaluate.examples_per_task = 3
    config.decode.max_new_tokens = 8
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """JAX's cache on disk, which spares the scripts here compiling the same programs again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


def script(name, *arguments, wait=True, stdin=None):
    """Runs a script with TensorFlow left alone and one XLA device."""
    command = [sys.executable, str(REPO / "scripts" / name), *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if not wait:
        return process
    out, err = process.communicate(stdin, timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def train(config, workdir, *arguments, wait=True):
    return script(
        "train.py",
        f"--config={config}",
        f"--workdir={workdir}",
        "--tensorboard=false",
        *arguments,
        wait=wait,
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    shape = {**TINY_LLAMA, "vocab_size": 384, "max_position_embeddings": 256}
    write_folder(folder / "model", shape, weights_by_rule(shape))
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(model=str(folder / "model"), steps=STEPS))
    return path


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(config_file, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def stop_after(process, workdir, step, number):
    """Sends a signal once a checkpoint of at least `step` is whole."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(found >= step for found in steps(workdir)):
            process.send_signal(number)
            break
        time.sleep(0.01)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_killed_run_resumes_to_the_unbroken_result(config_file, unbroken, tmp_path):
    workdir = tmp_path / "killed"
    process = train(config_file, workdir, wait=False)
    status, _, err = stop_after(process, workdir, 6, signal.SIGKILL)
    assert status == -signal.SIGKILL, err
    resumed = train(config_file, workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(workdir, unbroken)
    assert steps(workdir)[-1] == STEPS


@pytest.mark.slow  # tests/training/test_loop.py stops the loop itself so
def test_sigterm_saves_exits_0_and_resumes(config_file, unbroken, tmp_path):
    workdir = tmp_path / "stopped"
    process = train(config_file, workdir, wait=False)
    status, out, err = stop_after(process, workdir, 3, signal.SIGTERM)
    assert status == 0, err
    assert "stopped by SIGTERM after saving" in out
    stopped_at = steps(workdir)[-1]
    assert 3 <= stopped_at < STEPS
    resumed = train(config_file, workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(workdir, unbroken)
    assert steps(workdir)[-1] == STEPS


def test_the_run_learns_and_says_what_it_did(unbroken):
    lines = [line for line in read_metrics(unbroken) if "train/loss" in line]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["method"] == "sira"
    assert summary["trained_parameters"] > 0
    report = json.loads((unbroken / "router.json").read_text())
    loads = np.asarray(report["projections"]["attention/q"]["task_expert_load"])
    assert loads.shape == (3, 2, 4)
    np.testing.assert_allclose(loads.sum(-1), 1, atol=1e-5)


def test_evaluate_and_generate(unbroken, tmp_path):
    evaluated = script("evaluate.py", f"--workdir={unbroken}")
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((unbroken / "evaluation_test.json").read_text())
    assert results["examples"] == {"cldr_number_en": 3, "cldr_relative_sw": 3}
    assert set(results["scores"]["cldr_number_en"]) == {"exact_match", "chrf"}
    assert (unbroken / "router_test.json").exists()
    assert len((unbroken / "predictions_test.jsonl").read_text().splitlines()) == 6

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "Write the number 12 in the format of English.\nAnother one\\nwith a break\n"
    )
    answered = script("generate.py", f"--workdir={unbroken}", f"--file={prompts}")
    assert answered.returncode == 0, answered.stderr
    assert len(answered.stdout.splitlines()) == 2

    asked = script("generate.py", f"--workdir={unbroken}", stdin="One prompt\n\n")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip() != ""


@pytest.mark.slow  # tests/training/test_loop_checkpoints.py refuses in this process
def test_resuming_with_another_config_is_refused(config_file, unbroken):
    before = sorted(str(p) for p in unbroken.rglob("*"))
    refused = train(config_file, unbroken, "--config.adapter.rank=3")
    assert refused.returncode == 2
    assert "adapter.rank=2" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sorted(str(p) for p in unbroken.rglob("*")) == before
