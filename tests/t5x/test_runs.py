"""Whole runs as users start them: the scripts with gin files, each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sira_jax.adapters import is_adapter, make_config, partition
from sira_jax.checkpoints.adapter_file import CONFIG, read_header
from tests.quick import QUICK_COMPILE, as_flags
from tests.t5x.tiny_t5x import MISSING

pytestmark = pytest.mark.t5x
pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)

REPOSITORY = Path(__file__).parents[2]
PERIODS = ("EVAL_PERIOD=2", "EVAL_STEPS=1", "CHECKPOINT_PERIOD=2")
NO_DECODING = "train.infer_eval_dataset_cfg=None"


def run(script, files, *bindings, check=True):
    """Runs a script with gin files and bindings, NAME=VALUE, where a value without quotes or brackets is Python too."""
    command = [sys.executable, str(REPOSITORY / "scripts" / f"t5x_{script}.py")]
    command += [f"--gin_file={name}" for name in files]
    command += [f"--gin.{binding}" for binding in bindings]
    flags = as_flags(QUICK_COMPILE)
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


def text(value):
    return f"'{value}'"


def files(adapter, kind, *more):
    return (
        "test/tiny_t5.gin",
        f"adapters/{adapter}.gin",
        f"runs/{kind}.gin",
        "tests/t5x/tiny_run.gin",
        *more,
    )


def train(adapter, directory, steps, *bindings, more=(), **options):
    bindings = (f"MODEL_DIR={text(directory)}", f"TRAIN_STEPS={steps}", *PERIODS, *bindings)
    return run("train", files(adapter, "finetune", *more), *bindings, **options)


def written(log, step, collection="train"):
    """What T5X wrote at a step, by name."""
    values = {}
    for line in log.splitlines():
        if f"[{step}] collection={collection} " in line:
            values |= {
                name: float(number)
                for name, number in re.findall(r"([\w/]+)=(-?[\d.]+(?:e-?\d+)?)", line)
            }
    return values


def target(path):
    from t5x import checkpoints

    return checkpoints.load_t5x_checkpoint(str(path))["target"]


# SiRA on a base that plain T5X wrote: train, resume, evaluate, infer, export.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tests.t5x.plain_t5x import write_checkpoint

    directory = tmp_path_factory.mktemp("base")
    return write_checkpoint(directory, num_encoder_layers=2, num_decoder_layers=2)[0]


@pytest.fixture(scope="module")
def sira(base, tmp_path_factory):
    """(run directory after 2 steps and 2 more, log of each part)."""
    directory = tmp_path_factory.mktemp("sira")
    start = f"INITIAL_CHECKPOINT_PATH={text(base)}"
    first = train("sira", directory, 2, start, NO_DECODING)
    return directory, first.stderr, train("sira", directory, 4, start).stderr


def test_training_a_mixture_logs_the_router_and_resumes(sira):
    directory, first, second = sira
    metrics = written(first, 2)
    names = (
        "loss",
        "auxiliary_loss",
        "gradient_norm",
        "router/dropped_share",
        "router/expert_load/015",
    )
    assert all(np.isfinite(metrics[name]) for name in names)
    assert metrics["auxiliary_loss"] > 0
    assert "Starting main loop over steps 2-4" in second
    for task in ("tiny_mixture", "tiny_reverse", "tiny_first"):
        assert np.isfinite(written(second, 4, f"training_eval/{task}")["loss"])
    step_2, step_4 = (target(directory / f"checkpoint_{step}") for step in (2, 4))
    assert not partition(step_4, is_adapter)[1]
    moved = jax.tree.map(lambda a, b: np.any(a != b), step_2, step_4)
    assert any(jax.tree.leaves(moved))


def test_decoding_during_training_measures_each_task(sira):
    folder = sira[0] / "inference_eval"
    for task in ("tiny_reverse", "tiny_first"):
        (line,) = (folder / f"{task}-metrics.jsonl").read_text().splitlines()
        assert json.loads(line).keys() == {"step", "exact_match"}


@pytest.fixture(scope="module")
def trained(sira, base):
    return (
        f"CHECKPOINT_PATH={text(sira[0] / 'checkpoint_4')}",
        f"BASE_CHECKPOINT_PATH={text(base)}",
    )


def test_evaluation(trained, tmp_path):
    run("eval", files("sira", "eval"), *trained, f"EVAL_OUTPUT_DIR={text(tmp_path)}")
    (line,) = (tmp_path / "inference_eval" / "tiny_first-metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 4


def test_inference(trained, tmp_path):
    run("infer", files("sira", "infer"), *trained, f"INFER_OUTPUT_DIR={text(tmp_path)}")
    (file,) = tmp_path.glob("tiny_reverse-predict.jsonl-?????-of-?????")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 8
    assert all(isinstance(line["prediction"], str) for line in lines)


def test_export(trained, tmp_path):
    output = f"OUTPUT_DIR={text(tmp_path / 'adapter')}"
    run("export", files("sira", "export"), *trained, output)
    header = read_header(tmp_path / "adapter")
    expected = make_config({"method": "sira", "targets": ["query", "wo"]})
    assert header.config == expected
    assert (tmp_path / "adapter" / CONFIG).exists()


# Other methods, on a random base that the run's checkpoints hold.


@pytest.mark.parametrize("method", ["lora", "molora", "adamix"])
def test_a_method_by_gin_trains_and_leaves_the_base_alone(method, tmp_path):
    bindings = [NO_DECODING, "config.OptimizerConfig.learning_rate=0.1"]
    if method == "adamix":
        bindings.append("adamix.AdaMixConfig.dropout_rate=0.3")
    log = train(method, tmp_path, 2, *bindings, more=["runs/from_scratch.gin"]).stderr
    assert np.isfinite(written(log, 2)["loss"])
    parts = [partition(target(tmp_path / f"checkpoint_{step}"), is_adapter) for step in (0, 2)]
    (adapter, base), (new_adapter, new_base) = parts
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), base, new_base)
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(lambda a, b: np.any(a != b), adapter, new_adapter)
    assert any(jax.tree.leaves(moved))
    if method == "adamix":
        # The second pass's divergence.
        assert written(log, 2)["auxiliary_loss"] > 0


def test_a_decoder_trains_and_infers(tmp_path):
    sizes = ("test/tiny_decoder.gin", "adapters/lora.gin")
    data = "tests/t5x/tiny_run.gin"
    targets = "TARGETS=('q', 'down')"
    bindings = (f"MODEL_DIR={text(tmp_path)}", "TRAIN_STEPS=2", *PERIODS, NO_DECODING, targets)
    run("train", (*sizes, "runs/finetune.gin", data, "runs/from_scratch.gin"), *bindings)
    output = tmp_path / "infer"
    run(
        "infer",
        (*sizes, "runs/infer.gin", data),
        f"CHECKPOINT_PATH={text(tmp_path / 'checkpoint_2')}",
        f"INFER_OUTPUT_DIR={text(output)}",
        targets,
    )
    (file,) = output.glob("tiny_first-predict.jsonl-?????-of-?????")
    assert len(file.read_text().splitlines()) == 8


# Mistakes.


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["sira.SiRAConfig.rank=0"], "adapter.rank=0 is not allowed: a whole number of at least 1"),
        (["MIXTURE_OR_TASK_NAME='tiny_mixtur'"], "did you mean 'tiny_mixture'?"),
        (
            ["INITIAL_CHECKPOINT_PATH='/nowhere/checkpoint_1'"],
            "/nowhere/checkpoint_1: cannot be restored",
        ),
    ],
)
def test_a_users_mistake_is_one_line(bindings, message, tmp_path):
    start = "INITIAL_CHECKPOINT_PATH='x'"
    done = train("sira", tmp_path, 2, start, *bindings, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
