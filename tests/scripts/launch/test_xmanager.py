"""The launch script, run with a module in XManager's place."""

import contextlib
import sys
import types

import pytest

from scripts.launch import xmanager
from scripts.launch.check_files import check_files
from sira_jax.errors import ConfigError
from tests.scripts.launch import launches


class Experiment:
    def __init__(self):
        self.packaged, self.jobs = [], []

    def package(self, packageables):
        self.packaged += packageables
        return packageables

    def add(self, job):
        self.jobs.append(job)


def record(kind):
    """A class of XManager's that keeps its arguments."""

    def make(*args, **fields):
        return types.SimpleNamespace(kind=kind, args=args, **fields)

    return make


def run(text, monkeypatch):
    """Runs the script's main; returns the experiment and its title."""
    experiment, titles = Experiment(), []

    @contextlib.contextmanager
    def create_experiment(experiment_title):
        titles.append(experiment_title)
        yield experiment

    xm = types.SimpleNamespace(
        **{
            name: record(name)
            for name in ("Packageable", "Container", "JobRequirements", "ShellSafeArg")
        },
        # `args` of a job is a field here, not the positional arguments.
        Job=lambda **fields: types.SimpleNamespace(**fields),
    )
    vertex = record("Vertex")
    vertex.Spec = record("Spec")
    xm_local = types.SimpleNamespace(create_experiment=create_experiment, Vertex=vertex)
    package = types.ModuleType("xmanager")
    package.xm, package.xm_local = xm, xm_local
    monkeypatch.setitem(sys.modules, "xmanager", package)
    names = {"__name__": "launch"}
    exec(compile(text, "launch.py", "exec"), names)
    names["main"]([])
    return experiment, titles


def test_a_sweep_of_work_units(monkeypatch):
    env = {f"V{i}": value for i, value in enumerate(launches.HOSTILE) if "$(" not in value}
    arguments = tuple(env.values())
    config = launches.launch(
        job={
            "command": ("python", "scripts/train.py", *arguments),
            "sweep": (("--rank=2",), ("--rank=4",)),
            "env": env,
        },
        xmanager={"accelerator": "l4_24th", "count": 2, "cpus": 8, "memory_gib": 32},
    )
    files = xmanager.render(config)
    check_files(files)
    experiment, titles = run(files["launch.py"], monkeypatch)
    assert titles == ["a-job"]
    [packaged] = experiment.packaged
    assert packaged.executable_spec.image_path == "registry.example.org/images/sira-jax:1"
    assert packaged.executor_spec.kind == "Spec"
    assert len(experiment.jobs) == 2
    for index, job in enumerate(experiment.jobs):
        assert all(argument.kind == "ShellSafeArg" for argument in job.args)
        assert [argument.args[0] for argument in job.args] == [
            "python",
            "scripts/train.py",
            *arguments,
            f"--rank={2 + 2 * index}",
            f"--workdir=/gcs/a-bucket/runs/a-job/{index:04d}",
            "--stopped_status=75",
        ]
        assert job.env_vars == env
        requirements = job.executor.requirements
        assert (requirements.l4_24th, requirements.cpu) == (2, 8)
        assert requirements.ram == 32 * 1024**3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"job": {"output": "/runs"}}, "job.output='/runs' is not allowed: xmanager"),
        ({"job": {"image": None}}, "job.image=None is not allowed: target xmanager needs it"),
        ({"job": {"spot": True}}, "job.spot=True is not allowed: xmanager"),
        ({"job": {"env": {"A": "$(HOME)"}}}, "job.env.A='$(HOME)' is not allowed: xmanager"),
        ({"job": {"command": ("$(x)",)}}, "job.command='$(x)' is not allowed: xmanager"),
    ],
)
def test_mistakes(sections, message):
    with pytest.raises(ConfigError) as error:
        xmanager.render(launches.launch(**sections))
    assert str(error.value).startswith(message)


def test_the_check_finds_damage():
    files = xmanager.render(launches.launch())
    with pytest.raises(ConfigError, match=r"launch\.py: .*never closed"):
        check_files({"launch.py": files["launch.py"] + "\n("})
