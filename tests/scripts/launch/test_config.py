"""The fields' checks: one line that names the field, the value and what is allowed."""

import pytest

from scripts.launch.config import make_launch
from sira_jax.errors import ConfigError
from tests.scripts.launch import launches


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("job", "name", None),
        ("job", "name", "A-Job"),
        ("job", "name", "a job"),
        ("job", "name", "a-job\n"),
        ("job", "name", "x; rm"),
        ("job", "name", "a" * 29),
        ("job", "command", ()),
        ("job", "command", None),
        ("job", "command", "python scripts/train.py"),
        ("job", "sweep", "--rank=2"),
        ("job", "env", ("A=1",)),
        ("job", "output", "runs"),
        ("job", "output", "/runs/two words"),
        ("job", "output", "/runs/$HOME"),
        ("job", "output", "/runs\n#SBATCH --nodes=9"),
        ("job", "output", "gs://B/x"),
        ("job", "output", "s3://bucket/x"),
        ("job", "image", "image with spaces"),
        ("job", "image", "-image"),
        ("job", "checkout", "relative"),
        ("job", "repository", "--upload-pack=x"),
        ("job", "repository", "ext::sh -c x"),
        ("job", "repository", "https://x\ny"),
        ("job", "revision", "--force"),
        ("job", "revision", None),
        ("job", "max_restarts", -1),
        ("job", "max_restarts", True),
        ("job", "grace_seconds", 0),
        ("job", "grace_seconds", 1.5),
        ("job", "spot", 1),
        ("tpu", "generation", "v7"),
        ("tpu", "topology", "4x4x4"),
        ("tpu", "topology", "4x0"),
        ("tpu", "topology", "3x3"),
        ("tpu", "topology", "4 x 4"),
        ("tpu", "slices", 0),
        ("google", "project", "a project"),
        ("google", "zone", "--zone"),
        ("google", "namespace", None),
        ("google", "volume_claim", "a\nb"),
        ("google", "chips_per_host", 2),
        ("google", "setup", "true"),
        ("google", "setup", ("true\nfalse",)),
        ("google", "create_attempts", 0),
        ("google", "delete_when_done", "no"),
        ("slurm", "partition", "gpu --exclusive"),
        ("slurm", "partition", "gpu\n#SBATCH --exclusive"),
        ("slurm", "account", "$(id)"),
        ("slurm", "constraint", "a b"),
        ("slurm", "nodes", 0),
        ("slurm", "gpus_per_node", -1),
        ("slurm", "memory", "64 GB"),
        ("slurm", "time_limit", "tomorrow"),
        ("slurm", "time_limit", "12:0"),
        ("slurm", "max_parallel", 0),
        ("xmanager", "accelerator", "tpu_v5e"),
        ("xmanager", "count", 0),
        ("xmanager", "cpus", "4"),
    ],
)
def test_values_that_are_not_allowed(section, field, value):
    with pytest.raises(ConfigError) as error:
        launches.launch(**{section: {field: value}})
    name = f"{section}.{field}"
    shown = value[0] if name == "google.setup" and isinstance(value, tuple) else value
    assert str(error.value).startswith(name)
    assert f"={shown!r} is not allowed: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"command": ("a", "b\nc")}, "job.command[1]='b\\nc' is not allowed: one line"),
        ({"command": ("a", "b\x1b[2J")}, "job.command[1]='b\\x1b[2J' is not allowed: one line"),
        ({"command": ("a", "b\u2028c")}, "job.command[1]='b\\u2028c' is not allowed: one line"),
        ({"command": ("a", 3)}, "job.command[1]=3 is not allowed: one line"),
        ({"command": ("a", "--workdir=/x")}, "job.command[1]='--workdir=/x' is not allowed: the"),
        ({"sweep": (("--multihost",),)}, "job.sweep[0][0]='--multihost' is not allowed: the"),
        ({"sweep": ("--rank=2",)}, "job.sweep[0]='--rank=2' is not allowed: a tuple"),
        ({"env": {"A B": "1"}}, "job.env's name 'A B'='A B' is not allowed: letters"),
        ({"env": {"A": "1\n"}}, "job.env.A='1\\n' is not allowed: one line"),
        ({"env": {"A": 1}}, "job.env.A=1 is not allowed: one line"),
    ],
)
def test_words_and_variables(job, message):
    with pytest.raises(ConfigError) as error:
        launches.launch(job=job)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"jobs": {}}, "config.jobs: no such section; a launch config has job, tpu, "),
        ({"job": {"nmae": "x"}}, "job.nmae: no such field; job has name, command, "),
        ({"job": {"name": "x"}}, "job.command=None is not allowed: every launch needs it"),
        ({}, "job.name=None is not allowed: every launch needs it"),
    ],
)
def test_unknown_and_missing_fields(config, message):
    with pytest.raises(ConfigError) as error:
        make_launch(config)
    assert str(error.value).startswith(message)


def test_run_directories():
    job = launches.launch(job={"output": "gs://b-1.x/a/b", "sweep": (("x",), ("y",))}).job
    assert (job.bucket, job.directory) == ("b-1.x", "/gcs/b-1.x/a/b")
    assert job.workdir(1) == "/gcs/b-1.x/a/b/a-job/0001"
    job = launches.launch(job={"output": "/a"}).job
    assert (job.bucket, job.directory, job.workdir(0)) == (None, "/a", "/a/a-job")
