"""scripts/launch/render.py from the command line, and the example configs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.launch import starter, sweep
from scripts.launch.check_files import check_files
from scripts.launch.config import make_launch
from scripts.launch.script import START
from scripts.launch.targets import TARGETS
from tests.scripts.launch import launches

ROOT = Path(__file__).parents[3]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "scripts/launch/render.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


STARTER = "--config=configs/launch/starter.py"
SHARED = "--config.job.output=/shared/runs"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("example", [starter, sweep])
def test_every_example_renders_for_every_target(example, target):
    config = example.get_config()
    if target == "slurm":
        config.job.output = "/shared/runs"
    files = TARGETS[target](make_launch(config.to_dict()))
    assert START in files
    assert len(check_files(files)) == len(files)
    runs = len(config.job.sweep) or 1
    text = "\n".join(files.values())
    name = config.job.name
    assert all(f"/runs/{name}" + (f"/{i:04d}" if runs > 1 else "") in text for i in range(runs))
    assert "scripts/train.py" in text


def test_files_are_written_and_nothing_is_run(tmp_path):
    fakes = tmp_path / "bin"
    launches.fake(fakes, "sbatch", "")
    path = f"{fakes}:{os.environ['PATH']}"
    out = tmp_path / "a new" / "folder"
    shared = f"--config.job.output={tmp_path}/runs"
    done = run(STARTER, shared, "--target=slurm", f"--out={out}", PATH=path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in out.iterdir()) == ["job.sbatch", "submit.sh"]
    assert os.access(out / "submit.sh", os.X_OK)
    assert done.stdout.splitlines()[-1] == f"bash {out}/submit.sh starts it"
    assert launches.calls(fakes) == []
    assert (
        run(STARTER, shared, "--target=slurm", f"--out={out}", "--run", PATH=path).returncode == 0
    )
    assert launches.calls(fakes) == [["sbatch", "job.sbatch"]]


def test_dry_run_checks_and_writes_nothing(tmp_path):
    done = run(STARTER, "--target=gke", "--dry_run", f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "jobset.yaml: schema of JobSet\nsubmit.sh: bash -n\n"
    assert not (tmp_path / "out").exists()


MISTAKES = [
    ((), "--config=FILE is needed"),
    ((STARTER,), "--target is needed: one of slurm, gke, tpu_vm, xpk, xmanager"),
    ((STARTER, "--target=pbs"), "--target=pbs: value should be one of"),
    ((STARTER, "--target=gke"), "--out=DIR is needed, or --dry_run"),
    ((STARTER, "--target=gke", "--run", "--dry_run"), "--run and --dry_run exclude"),
    ((STARTER, "--target=gke", "--config.job.name=A"), "job.name='A' is not allowed"),
    ((STARTER, "--target=slurm", "--out=x"), "job.output='gs://my-bucket/runs' is not allowed"),
    ((STARTER, "--target=gke", "--config.job.nmae=x"), "--config.job.nmae: no such field"),
    ((STARTER, SHARED, "--target=slurm", "--out=README.md"), "--out=README.md: File exists"),
    (
        (
            "--config=configs/experiments/starter.py:sira",
            "--target=gke",
            "--dry_run",
        ),
        "config.adapter: no such section",
    ),
    (
        (STARTER, SHARED, "--target=slurm", "--dry_run", "--config.slurm.setup=if true; then"),
        "job.sbatch: bash -n: ",
    ),
]


# Each is a process of its own: the fast suite has the first three.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(*mistake, marks=[pytest.mark.slow] if place > 2 else [])
        for place, mistake in enumerate(MISTAKES)
    ],
)
def test_mistakes_give_one_line(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
