"""scripts/train.py as several real processes: the same run as one process's, stopped, killed and resumed on other meshes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts import assemble
from sira_jax.training.config import make_experiment
from sira_jax.training.logging import read_metrics
from sira_jax.training.multihost import LOST_STATUS
from tests.finished_runs import steps
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder
from tests.quick import QUICK_COMPILE, as_flags
from tests.scripts import flagged

# Processes compile and wait for one another for minutes; two of them in a shorter test: tests/training/test_meshes.py.
pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]
STEPS = 24
PATIENCE = 60

CONFIG = """
from configs import base
from configs.adapters import sira


def get_config():
    config = base.get_config()
    config.model.path = {model!r}
    config.adapter = sira.get_config(
        rank=2, num_experts=4, num_selected_experts=2, expert_dropout_rate=0.2, targets=("q", "down")
    )
    config.data.tasks = ("cldr_number_en", "cldr_relative_sw")
    config.data.vocabulary = "bytes"
    config.data.sequence_length = 128
    config.data.batch_size = 4
    config.train.num_steps = {steps}
    config.train.log_every = 1
    config.train.eval_every = 8
    config.train.checkpoint_every = 2
    config.optimizer.learning_rate = 0.01
    config.optimizer.epsilon = 1e-3
    config.evaluate.loss_examples_per_task = 4
    return config
"""


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
    """The run directory of one process on one device."""
    workdir = tmp_path_factory.mktemp("unbroken")
    scope = {}
    exec(config_file.read_text(), scope)
    plan = assemble.Plan(make_experiment(scope["get_config"]().to_dict()))
    with flagged.imported("train") as script:
        assert script.train(plan, workdir, tensorboard=False) == "done"
    return workdir


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def start(config_file, programs):
    """start(workdir, count, *flags) -> processes; those that a failed test leaves are killed."""
    started = []

    def start(workdir, count, *flags, devices=2, environ=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command = [sys.executable, str(REPO / "scripts/train.py"), f"--config={config_file}"]
        command += [f"--workdir={workdir}", "--tensorboard=false", "--multihost"]
        command += [f"--multihost_patience={PATIENCE}", *flags]
        common = {
            "XLA_FLAGS": as_flags(QUICK_COMPILE, devices),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        processes = []
        for index in range(count):
            who = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            who = who if environ is None else environ(index, count, address)
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=REPO,
                    env={**os.environ, **common, **who},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        started.extend(processes)
        return processes

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(processes):
    return [(*process.communicate(timeout=900), process.returncode) for process in processes]


def last_line(text):
    return text.strip().split("\n")[-1]


def wait_for(workdir, step, processes):
    """Returns once the run has a whole checkpoint of `step` or more."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        if any(found >= step for found in steps(workdir)):
            return
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step}")


def assert_same_run(workdir, unbroken):
    expected, got = read_metrics(unbroken), read_metrics(workdir)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    assert len([line for line in got if "validation/loss" in line]) == STEPS // 8
    for line, other in zip(got, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith("speed/"):
                np.testing.assert_allclose(line[name], value, rtol=1e-5, atol=2e-6, err_msg=name)
    summaries = [
        json.loads((folder / "summary.json").read_text()) for folder in (workdir, unbroken)
    ]
    assert summaries[0]["trained_parameters"] == summaries[1]["trained_parameters"]


def test_two_processes_stopped_killed_and_resumed_are_one_unbroken_run(start, unbroken, tmp_path):
    """Each start has another mesh, the last another number of processes."""
    workdir = tmp_path / "run"
    # SIGTERM reaches one process alone, and not the one that logs.
    processes = start(workdir, 2)
    wait_for(workdir, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    (out, err, status), (other_out, other_err, other_status) = finish(processes)
    assert (status, other_status) == (0, 0), err + other_err
    assert last_line(out).startswith("stopped by SIGTERM after saving")
    # Gloo itself writes to standard output.
    assert not [line for line in other_out.splitlines() if "connected" not in line]
    stopped = steps(workdir)[-1]
    assert 2 <= stopped < STEPS

    processes = start(workdir, 2, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    wait_for(workdir, stopped + 2, processes)
    processes[1].kill()
    _, err = processes[0].communicate(timeout=900)
    assert processes[0].returncode == LOST_STATUS, err
    line = last_line(err)
    sentence = "error: no sign of life from process 1 of 2; start all processes again"
    assert line.startswith(sentence), err
    assert stopped + 2 <= steps(workdir)[-1] < STEPS

    processes = start(workdir, 1, "--config.mesh.data=2", "--config.mesh.tensor=2", devices=4)
    ((_, err, status),) = finish(processes)
    assert status == 0, err
    assert_same_run(workdir, unbroken)


@pytest.mark.slow
def test_four_processes_and_the_loss_of_the_first(start, unbroken, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, 4, "--config.mesh.data=2", "--config.mesh.expert=2", devices=1)
    wait_for(workdir, 4, processes)
    processes[0].kill()
    for process in processes[1:]:
        _, err = process.communicate(timeout=900)
        assert process.returncode == LOST_STATUS, err
        assert last_line(err).startswith("error: ")
        assert "process 0" in last_line(err)
    processes = start(workdir, 4, "--config.mesh.data=1", "--config.mesh.tensor=4", devices=1)
    for _, err, status in finish(processes):
        assert status == 0, err
    assert_same_run(workdir, unbroken)


@pytest.mark.slow
def test_slurm_says_who_is_who(start, unbroken, tmp_path):
    def slurm(index, count, address):
        host, port = address.split(":")
        return {
            "SLURM_JOB_ID": "4711",
            "JAX_COORDINATOR_PORT": port,
            "SLURM_STEP_NODELIST": host,
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_NODES": str(count),
        }

    workdir = tmp_path / "run"
    for _, err, status in finish(start(workdir, 2, environ=slurm)):
        assert status == 0, err
    assert_same_run(workdir, unbroken)


@pytest.mark.slow
def test_a_mistake_on_one_machine_ends_all(start, config_file, tmp_path):
    """A model file that one process does not find."""
    started = []
    for index, flags in enumerate(([], ["--config.model.path=/nowhere"])):

        def who(_, count, address, index=index):
            return {
                "JAX_COORDINATOR_ADDRESS": who.address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }

        if not started:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                shared = f"localhost:{free.getsockname()[1]}"
        who.address = shared
        started += start(tmp_path / "run", 1, *flags, environ=who)
    (_, err, status), (_, other_err, other_status) = finish(started)
    assert (status, other_status) == (2, 2), err + other_err
    assert last_line(other_err).startswith("error: model.path='/nowhere' is not allowed")
    assert last_line(err).startswith("error: process 1 of 2 stopped: model.path='/nowhere'")
