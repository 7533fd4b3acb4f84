"""A sweep as a job array: the batch script of SLURM with stand-ins for its programs, and the manifest of GKE."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from scripts import sweep_jobs
from sira_jax.errors import ConfigError


def test_slurm_scripts_run_their_element(tmp_path):
    """The batch script with a python that writes down its arguments, and an scontrol that does too."""
    names = ["a/seed0", "b-rank=2"]
    (text,) = sweep_jobs.slurm(names, tmp_path / "it's", "n", 2, ["partition=gpu"]).values()
    assert "#SBATCH --partition=gpu\n" in text
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    for name in ("python", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >> {tmp_path}/args\nexit 3')
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    assert subprocess.run(["bash", str(script)], env=env, timeout=20).returncode == 3
    assert (tmp_path / "args").read_text().splitlines() == [
        "python",
        "scripts/sweep.py",
        f"--workdir={tmp_path}/it's",
        "--only=b-rank=2",
    ]
    with pytest.raises(ConfigError, match="--sbatch="):
        sweep_jobs.slurm(names, tmp_path, "n", 2, ["gpus=1; rm -rf /"])
    with pytest.raises(ConfigError, match="--job_name='my job'"):
        sweep_jobs.slurm(names, tmp_path, "my job", 2, [])


def test_a_stopped_slurm_element_is_requeued(tmp_path):
    (text,) = sweep_jobs.slurm(["a"], tmp_path, "n", 1, []).values()
    (tmp_path / "job.sbatch").write_text(text)
    bodies = {
        "python": 'trap "sleep 0.2; touch saved; exit 130" TERM; touch begun; while :; do sleep 0.02; done',
        "scontrol": '[ -e saved ] && echo "$@" > requeued',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_ARRAY_JOB_ID": "12",
    }
    process = subprocess.Popen(["bash", str(tmp_path / "job.sbatch")], env=env)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    process.terminate()
    process.wait(timeout=20)
    assert (tmp_path / "requeued").read_text() == "requeue 12_0\n"


def test_gke_manifests(tmp_path):
    names = ["a/seed0", "b"]
    (text,) = sweep_jobs.gke(names, Path("/mnt/s"), "sira", 2, "image:1", "claim").values()
    spec = json.loads(text)["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "sweep", "mountPath": "/mnt/s"}]
    # As Kubernetes expands it.
    program = container["command"][2].replace("$$", "$").replace("exec python", "echo")
    env = {"JOB_COMPLETION_INDEX": "0", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "scripts/sweep.py --workdir=/mnt/s --only=a/seed0\n"
    assert not re.search(r"(?<!\$)\$(?!\$)", container["command"][2])
    assert "resources" not in container
    assert "nodeSelector" not in spec["template"]["spec"]
    wanted = (["google.com/tpu=4"], ["cloud.google.com/gke-tpu-topology=2x2"])
    (text,) = sweep_jobs.gke(names, Path("/mnt/s"), "s", 2, "i", "claim", *wanted).values()
    pod = json.loads(text)["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "2x2"}
    with pytest.raises(ConfigError, match=r"--limit='tpu' is not allowed: NAME=VALUE"):
        sweep_jobs.gke(names, Path("/mnt/s"), "s", 2, "i", "claim", ["tpu"])
    with pytest.raises(ConfigError, match="needs --image"):
        sweep_jobs.gke(names, Path("/mnt/s"), "sira", 2, None, "claim")
    with pytest.raises(ConfigError, match=r"--job_name='Sira'"):
        sweep_jobs.gke(names, Path("/mnt/s"), "Sira", 2, "image:1", "claim")
