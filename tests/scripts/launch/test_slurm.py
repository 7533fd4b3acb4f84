"""The batch script, run with programs in place of SLURM's."""

import signal
import time

import pytest

from scripts.launch import slurm
from scripts.launch.check_files import check_files, sbatch_options
from sira_jax.errors import ConfigError
from tests.scripts.launch import launches


def render(tmp_path, program, sections=None, **job):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    fields = {
        "command": program.command,
        "checkout": str(checkout),
        "output": str(tmp_path / "runs"),
        **job,
    }
    files = slurm.render(launches.launch(job=fields, slurm=sections or {}))
    launches.write(tmp_path / "files", files)
    fakes = tmp_path / "bin"
    # The real srun would kill its tasks on SIGTERM; scancel signals them.
    launches.fake(fakes, "srun", f'shift; echo $$ >"{tmp_path}/step"; exec "$@"')
    launches.fake(fakes, "scancel", f'kill -TERM "$(cat "{tmp_path}/step")"')
    launches.fake(fakes, "scontrol", "")
    launches.fake(fakes, "sbatch", "")
    return files, fakes


def start(tmp_path, fakes, **env):
    script = tmp_path / "files" / "job.sbatch"
    return launches.run_script(script, fakes=fakes, SLURM_JOB_ID="17", **env)


def test_options(tmp_path):
    config = launches.launch(
        job={"output": "/runs", "grace_seconds": 90},
        slurm={
            "partition": "gpu",
            "account": "lab",
            "qos": "low",
            "constraint": "a100&ib",
            "nodes": 2,
            "gpus_per_node": 4,
            "cpus_per_task": 8,
            "memory": "64G",
            "time_limit": "1-12:00:00",
        },
    )
    files = slurm.render(config)
    assert sbatch_options(files["job.sbatch"]) == {
        "job-name": "a-job",
        "output": "/runs/a-job-logs/%x-%j.log",
        "open-mode": "append",
        "requeue": None,
        "signal": "B:TERM@90",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "8",
        "mem": "64G",
        "time": "1-12:00:00",
        "partition": "gpu",
        "account": "lab",
        "qos": "low",
        "constraint": "a100&ib",
    }
    assert "--multihost" in files["job.sbatch"]
    assert len(check_files(files)) == 2


def test_a_run_that_ends(tmp_path):
    env = {f"V{i}": value for i, value in enumerate(launches.HOSTILE)}
    program = launches.Program(tmp_path / "program", env=[*env, "SETUP"])
    command = (*program.command, *launches.HOSTILE)
    setup = {"setup": ("export SETUP=done", "if true; then", "  pwd >where; fi")}
    _, fakes = render(tmp_path, program, setup, command=command, env=env)
    process = start(tmp_path, fakes)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out + err
    [seen] = program.seen
    own = [f"--workdir={tmp_path}/runs/a-job", "--stopped_status=75"]
    assert seen["arguments"] == [*launches.HOSTILE, *own]
    assert seen["env"] == {**env, "SETUP": "done"}
    assert seen["directory"] == str(tmp_path / "checkout")
    assert (tmp_path / "checkout" / "where").read_text().strip() == seen["directory"]
    assert [call[0] for call in launches.calls(fakes)] == ["srun"]
    assert not list(tmp_path.rglob("pwned"))


def test_sigterm_is_passed_on_and_the_job_requeued(tmp_path):
    program = launches.Program(tmp_path / "program", "wait")
    _, fakes = render(tmp_path, program)
    process = start(tmp_path, fakes, SLURM_RESTART_COUNT="2")
    wait_for(program.waiting)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "requeued, restart 3 of at most 20" in out
    srun, *rest = launches.calls(fakes)
    assert srun[:2] == ["srun", "--kill-on-bad-exit=0"]
    assert rest == [["scancel", "--signal=TERM", "17"], ["scontrol", "requeue", "17"]]


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("status", "restarts", "end", "requeued"),
    [("75", "0", 0, True), ("1", "19", 0, True), ("1", "20", 1, False), ("2", "0", 2, False)],
)
def test_how_a_run_ends_decides(tmp_path, status, restarts, end, requeued):
    program = launches.Program(tmp_path / "program", status)
    _, fakes = render(tmp_path, program)
    process = start(tmp_path, fakes, SLURM_RESTART_COUNT=restarts)
    process.communicate(timeout=60)
    assert process.returncode == end
    assert (["scontrol", "requeue", "17"] in launches.calls(fakes)) == requeued


def test_a_setup_that_fails_is_not_requeued(tmp_path):
    program = launches.Program(tmp_path / "program")
    _, fakes = render(tmp_path, program, {"setup": ("false", "true")})
    process = start(tmp_path, fakes)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert launches.calls(fakes) == []


def test_a_sweep_is_a_job_array(tmp_path):
    program = launches.Program(tmp_path / "program")
    sweep = (("--rank=2", "x y"), ("--rank=4",), ("--rank=8",))
    files, fakes = render(tmp_path, program, {"max_parallel": 2}, sweep=sweep)
    options = sbatch_options(files["job.sbatch"])
    assert options["array"] == "0-2%2"
    assert options["output"].endswith("/%x-%A_%a.log")
    for index, arguments in enumerate(sweep):
        process = start(tmp_path, fakes, SLURM_ARRAY_TASK_ID=str(index))
        process.communicate(timeout=60)
        assert process.returncode == 0
        workdir = f"--workdir={tmp_path}/runs/a-job/{index:04d}"
        assert program.seen[index]["arguments"] == [*arguments, workdir, "--stopped_status=75"]
    process = start(tmp_path, fakes, SLURM_ARRAY_TASK_ID="3")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "launch: there is no run 3\n")


def test_submit_makes_the_directory_of_the_logs(tmp_path):
    program = launches.Program(tmp_path / "program")
    _, fakes = render(tmp_path, program)
    process = launches.run_script(tmp_path / "files" / "submit.sh", fakes=fakes)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert launches.calls(fakes) == [["sbatch", "job.sbatch"]]
    assert (tmp_path / "runs" / "a-job-logs").is_dir()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-00:00:01", 86401),
    ],
)
def test_time_limits(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"job": {"output": "gs://b-ucket/runs"}}, "job.output='gs://b-ucket/runs' is not allowed"),
        ({"job": {"checkout": None}}, "job.checkout=None is not allowed: target slurm needs it"),
        ({"job": {"spot": True}}, "job.spot=True is not allowed: slurm"),
        ({"slurm": {"time_limit": "3"}}, "slurm.time_limit='3' is not allowed: over"),
    ],
)
def test_mistakes(sections, message):
    job = {"output": "/runs", **sections.pop("job", {})}
    with pytest.raises(ConfigError) as error:
        slurm.render(launches.launch(job=job, **sections))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("--nodes=1", "--nodes=0", "--nodes=0: not a value"),
        ("--requeue", "--requeu", "--requeu: not an option"),
        ("--nodes=1", "--nodes=1 # x", None),
        ("B:TERM@120", "TERM@120", "--signal=TERM@120: not a value"),
        ("#SBATCH --nodes=1", "true\n#SBATCH --nodes=1", "sbatch reads"),
        ("esac\n", "\n", "bash -n"),
    ],
)
def test_the_check_finds_damage(old, new, message):
    files = slurm.render(launches.launch(job={"output": "/runs"}))
    files["job.sbatch"] = files["job.sbatch"].replace(old, new, 1)
    if message is None:
        check_files(files)
        return
    with pytest.raises(ConfigError, match=message):
        check_files(files)
