"""Real processes of scripts/train.py on a tiny model and data made here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from sira_jax.training.loop import CHECKPOINTS
from tests.finished_runs import lines, steps
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder

REPO = Path(__file__).resolve().parents[2]
TIMEOUT = 1800

CONFIG = """
from configs import base
from configs.adapters import sira


def get_config():
    config = base.get_config()
    config.model.path = {model!r}
    config.adapter = sira.get_config(
        rank=2, num_experts=4, num_selected_experts=2, expert_dropout_rate=0.2, dropout_rate=0.1
    )
    config.data.tasks = ("gsm8k",)
    config.data.vocabulary = "bytes"
    config.data.sequence_length = 64
    config.data.batch_size = 4
    config.train.num_steps = {steps}
    config.train.log_every = 10
    config.train.eval_every = 50
    config.train.checkpoint_every = {every}
    config.optimizer.learning_rate = 0.01
    config.evaluate.loss_examples_per_task = 4
    return config
"""


class Lab:
    """A model, data and a config in a folder, and the scripts run on them.

    Args:
      folder: an empty one.
      steps, every: of the runs and their checkpoints.
    """

    def __init__(self, folder, steps, every):
        self.folder, self.steps = folder, steps
        self.data = folder / "data"
        shape = {**TINY_LLAMA, "vocab_size": 384, "max_position_embeddings": 256}
        write_folder(folder / "model", shape, weights_by_rule(shape))
        self.write_data()
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG.format(model=str(folder / "model"), steps=steps, every=every))

    def write_data(self, extra=""):
        """The training file, the same each time but for `extra` at its end."""
        random = np.random.default_rng(0)
        rows = []
        for a, b in random.integers(0, 100, (300, 2)).tolist():
            answer = f"{a} + {b} = {a + b}\n#### {a + b}"
            rows.append(json.dumps({"question": f"What is {a} and {b}?", "answer": answer}))
        folder = self.data / "gsm8k"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n" + extra)
        (folder / "test.jsonl").write_text("\n".join(rows[:2]) + "\n")

    def start(self, script, *arguments, environment=None):
        """A process of a script, its output in pipes."""
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(REPO),
            **(environment or {}),
        }
        return subprocess.Popen(
            [sys.executable, str(REPO / "scripts" / script), *map(str, arguments)],
            cwd=REPO,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def train(self, workdir, *arguments, **options):
        """A process of scripts/train.py."""
        return self.start(
            "train.py",
            f"--config={self.config}",
            f"--workdir={workdir}",
            f"--data_dir={self.data}",
            "--tensorboard=false",
            *arguments,
            **options,
        )

    def done(self, workdir, *arguments, **options):
        """(exit status, standard output, standard error) of a run that is left to its end."""
        return finish(self.train(workdir, *arguments, **options))


def finish(process):
    """(exit status, standard output, standard error) of a process, once it has ended."""
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def the_error(err):
    """The one line of an error on standard error, without its "error: "; there is no stack trace."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert err.strip().splitlines()[-1] == lines[0], err
    return lines[0].removeprefix("error: ")


def writes(workdir):
    """Whether a checkpoint is being written, or was when the process ended."""
    return any((workdir / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"))


def wait_until(condition, process):
    """Whether a condition came true before a process ended."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return False


def bad_losses(workdir):
    """(steps that were skipped, batches that were left out by rewinds) of a finished run whose log has a line each 10 steps."""
    skipped = round(sum(10 * line.get("train/skipped", 0) for line in lines(workdir)))
    step = steps(workdir)[-1]
    position = json.loads((workdir / CHECKPOINTS / str(step) / "data" / "metadata").read_text())
    return skipped, position["data"]["num_batches"] - step
