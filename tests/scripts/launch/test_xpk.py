"""The xpk commands, taken by a program in xpk's place, and the pod's shell that they end in."""

import signal
import subprocess
import time

import pytest

from scripts.launch import xpk
from scripts.launch.check_files import check_files
from sira_jax.errors import ConfigError
from tests.scripts.launch import launches
from tests.scripts.launch.test_gke import expand


def submit(tmp_path, config):
    """The calls of xpk that submit.sh makes."""
    files = xpk.render(config)
    check_files(files)
    launches.write(tmp_path / "files", files)
    fakes = tmp_path / "bin"
    launches.fake(fakes, "xpk", "")
    process = launches.run_script(tmp_path / "files" / "submit.sh", fakes=fakes)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    return launches.calls(fakes)


def options(call):
    assert call[:3] == ["xpk", "workload", "create"]
    return dict(word.removeprefix("--").partition("=")[::2] for word in call[3:])


def test_options(tmp_path):
    config = launches.launch(
        tpu={"generation": "v5p", "topology": "4x4x4", "slices": 2},
        job={"spot": True, "max_restarts": 3, "grace_seconds": 60},
        google={"priority": "high"},
    )
    [call] = submit(tmp_path, config)
    given = options(call)
    command = given.pop("command")
    assert given == {
        "project": "a-project",
        "zone": "us-west4-a",
        "cluster": "a-cluster",
        "workload": "a-job",
        "tpu-type": "v5p-4x4x4",
        "num-slices": "2",
        "docker-image": "registry.example.org/images/sira-jax:1",
        "priority": "high",
        "max-restarts": "3",
        "restart-on-exit-codes": "1,75",
        "termination-grace-period-seconds": "60",
        "spot": "",
        "storage": "a-bucket",
    }
    assert command == (
        "exec env python scripts/train.py --config=a.py --workdir=/gcs/a-bucket/runs/a-job"
        " --stopped_status=75 --multihost"
    )


def test_the_bucket_is_attached_once():
    storage = xpk.render(launches.launch(job={"output": "gs://a.b_c/runs"}))["storage.sh"]
    assert "xpk storage attach a-b-c " in storage
    assert " --type=gcsfuse --bucket=a.b_c --mount-point=/gcs/a.b_c " in storage


def test_a_sweep_is_a_workload_each(tmp_path):
    config = launches.launch(job={"sweep": (("--rank=2",), ("--rank=4",))})
    given = [options(call) for call in submit(tmp_path, config)]
    assert [one["workload"] for one in given] == ["a-job-0", "a-job-1"]
    assert "--rank=4 --workdir=/gcs/a-bucket/runs/a-job/0001" in given[1]["command"]


def start_pod(command):
    """Runs a command in the way that xpk's container does: in a subshell in the background, its process signalled."""
    script = f"trap 'kill -TERM $! 2>/dev/null' TERM\n({command}) & PID=$!\n"
    script += "while kill -0 $PID 2>/dev/null; do sleep 0.05; done\nwait $PID\n"
    return subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL)


def test_every_value_reaches_the_training(tmp_path):
    env = {f"V{i}": value for i, value in enumerate(launches.HOSTILE)}
    program = launches.Program(tmp_path / "program", env=env)
    config = launches.launch(job={"command": (*program.command, *launches.HOSTILE), "env": env})
    [call] = submit(tmp_path, config)
    pod = start_pod(expand(options(call)["command"], {"HOME": "must not be put in"}))
    assert pod.wait(timeout=60) == 0
    [seen] = program.seen
    assert tuple(seen["arguments"][: len(launches.HOSTILE)]) == launches.HOSTILE
    assert seen["env"] == env


def test_sigterm_reaches_the_training(tmp_path):
    program = launches.Program(tmp_path / "program", "wait")
    [call] = submit(tmp_path, launches.launch(job={"command": program.command}))
    pod = start_pod(options(call)["command"])
    deadline = time.monotonic() + 30
    while not program.waiting.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=60) == 75


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"google": {"cluster": None}}, "google.cluster=None is not allowed: target xpk needs it"),
        ({"google": {"priority": "urgent"}}, "google.priority='urgent' is not allowed: xpk"),
        ({"job": {"image": None}}, "job.image=None is not allowed: target xpk needs it"),
    ],
)
def test_mistakes(sections, message):
    with pytest.raises(ConfigError) as error:
        xpk.render(launches.launch(**sections))
    assert str(error.value).startswith(message)
