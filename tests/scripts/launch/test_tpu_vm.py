"""The loop on the user's machine and the script on the hosts, run with programs in place of gcloud's and systemd's."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts.launch import tpu_vm
from scripts.launch.check_files import check_files
from sira_jax.errors import ConfigError
from tests.scripts.launch import launches

# A gcloud with one slice. The file `states` holds what `list` says, one word a call, the last for ever; `create` and `delete`
# put their own word there. The file `statuses` holds how each `worker.sh run` ends.
GCLOUD = """
cd "{folder}"
next() {{ read -r first rest <"$1"; echo "${{rest:-$2}}" >"$1"; echo "$first"; }}
case "$4" in
  list)
    state="$(next states "$(cat states)")"
    if [ "$state" = FAIL ]; then exit 1; fi
    if [ "$state" != - ]; then echo "$state"; fi ;;
  create) echo READY >states ;;
  delete) echo - >states ;;
  ssh)
    case "$*" in *" run "*)
      status="$(next statuses 0)"
      if [ "$status" = PREEMPTED ]; then echo PREEMPTED >states; exit 255; fi
      exit "$status" ;;
    esac ;;
esac
"""


def start(tmp_path, config, states="-", statuses="0", gcloud=GCLOUD):
    files = tpu_vm.render(config)
    check_files(files)
    launches.write(tmp_path / "files", files)
    fakes = tmp_path / "bin"
    launches.fake(fakes, "gcloud", gcloud.format(folder=tmp_path))
    (tmp_path / "states").write_text(states + "\n")
    (tmp_path / "statuses").write_text(statuses + "\n")
    return launches.run_script(tmp_path / "files" / "submit.sh", fakes=fakes), fakes


def finish(started):
    """(exit status, output, what gcloud was asked for: verbs, and for ssh what the hosts do)."""
    process, fakes = started
    out, err = process.communicate(timeout=120)
    assert err == ""
    asked = []
    for call in launches.calls(fakes):
        assert call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        assert call[-3:] == ["--project=a-project", "--zone=us-west4-a", "--quiet"]
        verb, rest = call[4], call[5:-3]
        if verb == "ssh":
            assert rest[:2] == ["a-job", "--worker=all"]
            verb = rest[2].removeprefix("--command=bash worker-a-job.sh ")
        if verb != "list":
            asked.append(verb)
    return process.returncode, out, asked


ONCE = ["scp", "stop", "install"]


def test_a_run_from_creation_to_deletion(tmp_path):
    tpu = {"generation": "v6e", "topology": "4x8"}
    google = {"network": "net", "service_account": "a@b.iam.gserviceaccount.com"}
    config = launches.launch(tpu=tpu, google=google, job={"spot": True})
    started = start(tmp_path, config)
    status, _, asked = finish(started)
    assert (status, asked) == (0, ["create", *ONCE, "run 0", "delete"])
    [create] = [call for call in launches.calls(started[1]) if call[4] == "create"]
    assert create[5:-3] == [
        "a-job",
        "--accelerator-type=v6e-32",
        "--version=v2-alpha-tpuv6e",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--network=net",
        "--service-account=a@b.iam.gserviceaccount.com",
        "--spot",
    ]
    [scp] = [call for call in launches.calls(started[1]) if call[4] == "scp"]
    assert scp[5:-3] == [f"{tmp_path}/files/worker.sh", "a-job:worker-a-job.sh", "--worker=all"]


def test_a_preempted_slice_is_made_anew_and_the_run_goes_on(tmp_path):
    started = start(tmp_path, launches.launch(), states="READY", statuses="PREEMPTED 75 0")
    status, out, asked = finish(started)
    assert status == 0
    again = [*ONCE, "run 0"]
    assert asked == [*again, "delete", "create", *again, *again, "delete"]
    assert "status 255; restart 1 of at most 20" in out
    assert "status 75; restart 2 of at most 20" in out


def test_maintenance_and_silence_are_waited_for(tmp_path):
    started = start(tmp_path, launches.launch(), states="FAIL REPAIRING STARTING READY")
    status, out, asked = finish(started)
    assert (status, asked) == (0, [*ONCE, "run 0", "delete"])
    assert "REPAIRING: waiting" in out


def test_a_sweep_runs_one_after_another_on_one_slice(tmp_path):
    config = launches.launch(job={"sweep": (("--rank=2",), ("--rank=4",))})
    status, _, asked = finish(start(tmp_path, config, statuses="0 75 0"))
    assert status == 0
    assert [what for what in asked if what.startswith("run")] == ["run 0", "run 1", "run 1"]
    assert asked.count("create") == asked.count("delete") == 1


@pytest.mark.parametrize(
    ("job", "statuses", "end", "runs"),
    [({}, "2", 2, 1), ({"max_restarts": 1}, "1 1 0", 1, 2), ({"max_restarts": 0}, "75 0", 75, 1)],
)
def test_it_gives_up_and_deletes_the_slice(tmp_path, job, statuses, end, runs):
    status, _, asked = finish(start(tmp_path, launches.launch(job=job), statuses=statuses))
    assert (status, asked.count("run 0"), asked[-1]) == (end, runs, "delete")


def test_it_gives_up_creating(tmp_path):
    config = launches.launch(google={"create_attempts": 2, "delete_when_done": False})
    no_capacity = 'if [ "$4" = create ]; then exit 1; fi'
    status, out, asked = finish(start(tmp_path, config, gcloud=no_capacity))
    assert (status, asked) == (1, ["create", "create"])
    assert "goes on costing" in out


# --- worker.sh ---

# systemd-run that starts the unit's command in the background, and a systemctl that knows of it.
SYSTEMD_RUN = """
until [ "$1" = -- ]; do shift; done
shift
"$@" >>"$HOME/a-job/log" 2>&1 &
echo $! >"$HOME/unit"
"""
SYSTEMCTL = """
unit() { [ -f "$HOME/unit" ] && kill -0 -- "$(cat "$HOME/unit")" 2>/dev/null; }
case "$1" in
  is-active) if unit; then echo active; else echo inactive; exit 3; fi ;;
  stop)
    if unit; then
      # As systemd does: every process of the unit.
      main="$(cat "$HOME/unit")"
      kill -TERM $(cat "/proc/$main/task/$main/children") "$main"
      while unit; do sleep 0.05; done
    fi ;;
esac
"""


@pytest.fixture
def host(tmp_path):
    """A host: its home and its fakes."""
    fakes = tmp_path / "bin"
    launches.fake(fakes, "sudo", 'exec "$@"')
    launches.fake(fakes, "mountpoint", "")
    launches.fake(fakes, "systemd-run", SYSTEMD_RUN)
    launches.fake(fakes, "systemctl", SYSTEMCTL)
    (tmp_path / "a-job" / "checkout").mkdir(parents=True)
    return tmp_path


def worker(host, program, *arguments, **job):
    """Starts worker.sh on the host."""
    config = launches.launch(job={"command": program.command, **job})
    launches.write(host, {"worker.sh": tpu_vm.render(config)["worker.sh"]})
    fakes, home = host / "bin", str(host)
    return launches.run_script(host / "worker.sh", *arguments, fakes=fakes, HOME=home)


def test_the_hosts_run_the_command(host):
    env = {f"V{i}": value for i, value in enumerate(launches.HOSTILE)}
    program = launches.Program(host / "program", env=env)
    command = (*program.command, *launches.HOSTILE)
    process = worker(host, program, "run", "0", command=command, env=env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    [seen] = program.seen
    own = ["--workdir=/gcs/a-bucket/runs/a-job", "--stopped_status=75", "--multihost"]
    assert seen["arguments"] == [*launches.HOSTILE, *own]
    assert seen["env"] == env
    assert seen["directory"] == str(host / "a-job" / "checkout")
    [unit] = [call for call in launches.calls(host / "bin") if call[0] == "systemd-run"]
    assert "--unit=train-a-job" in unit
    assert "--property=TimeoutStopSec=120" in unit
    assert not list(host.rglob("pwned"))


@pytest.mark.parametrize("status", ["2", "1"])
def test_the_training_decides_the_status(host, status):
    program = launches.Program(host / "program", status)
    process = worker(host, program, "run", "0")
    process.communicate(timeout=120)
    assert process.returncode == int(status)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_a_broken_connection_does_not_stop_the_training(host):
    """The watcher is killed and started again; the training, started once, is then stopped and has saved."""
    program = launches.Program(host / "program", "wait")
    first = worker(host, program, "run", "0")
    wait_for(program.waiting)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    second = worker(host, program, "run", "0")
    time.sleep(0.5)
    assert second.poll() is None
    stop = worker(host, program, "stop")
    stop.communicate(timeout=60)
    assert stop.returncode == 0
    second.wait(timeout=60)
    assert second.returncode == 75
    assert len(program.seen) == 1


def test_a_killed_training_is_a_failure(host):
    program = launches.Program(host / "program", "wait")
    process = worker(host, program, "run", "0")
    wait_for(program.waiting)
    main = (host / "unit").read_text().strip()
    [training] = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    os.kill(int(training), signal.SIGKILL)
    process.wait(timeout=60)
    # The shell around it lives on and writes the status of SIGKILL down.
    assert process.returncode == 137


def test_a_host_that_was_cut_off_counts_as_stopped(host):
    """Nothing is left to write a status."""
    program = launches.Program(host / "program", "wait")
    process = worker(host, program, "run", "0")
    wait_for(program.waiting)
    main = (host / "unit").read_text().strip()
    [training] = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    for number in (main, training):
        os.kill(int(number), signal.SIGKILL)
    process.wait(timeout=60)
    assert process.returncode == 75


def test_installation(host):
    """Clones what it is told to, installs it, and runs the setup lines in it with its Python first."""
    source = host / "source"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "-q", "-b", "trunk", str(source)], check=True)
    (source / "requirements.txt").write_text("numpy\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (host / "a-job" / "checkout").rmdir()
    fakes = host / "bin"
    launches.fake(fakes, "python3", "")
    uv = host / ".local" / "bin"
    launches.fake(uv, "uv", 'if [ "$1" = venv ]; then mkdir -p .venv/bin; fi')
    config = launches.launch(
        job={"repository": f"file://{source}", "revision": "trunk"},
        google={"setup": ('echo "${PATH%%:*}" >first_on_path',)},
    )
    launches.write(host, {"worker.sh": tpu_vm.render(config)["worker.sh"]})
    for _ in range(2):
        process = launches.run_script(
            host / "worker.sh", "install", fakes=fakes, HOME=str(host), GIT_ALLOW_PROTOCOL="file"
        )
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    checkout = host / "a-job" / "checkout"
    assert (checkout / "requirements.txt").read_text() == "numpy\n"
    assert (checkout / "first_on_path").read_text() == f"{checkout}/.venv/bin\n"
    installs = [call for call in launches.calls(uv) if call[1:3] == ["pip", "install"]]
    assert installs[0][-3:] == ["--requirement", "requirements.txt", "jax[tpu]"]
    assert installs[1][-3:] == ["--no-deps", "--editable", "."]


def test_a_failed_installation_is_no_mistake_of_the_training(host):
    launches.fake(host / "bin", "git", "exit 2")
    process = worker(host, launches.Program(host / "program"), "install")
    process.communicate(timeout=60)
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("generation", "topology", "several", "name"),
    [
        ("v5e", "2x4", False, "v5litepod-8"),
        ("v5e", "4x4", True, "v5litepod-16"),
        ("v5p", "2x2x1", False, "v5p-8"),
        ("v5p", "2x2x2", True, "v5p-16"),
        ("v4", "2x2x4", True, "v4-32"),
    ],
)
def test_slices(generation, topology, several, name):
    tpu = {"generation": generation, "topology": topology}
    files = tpu_vm.render(launches.launch(tpu=tpu))
    assert ("--multihost" in files["worker.sh"]) == several
    assert f"--accelerator-type={name} " in files["submit.sh"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"job": {"output": "/runs"}}, "job.output='/runs' is not allowed: tpu_vm"),
        ({"job": {"repository": None}}, "job.repository=None is not allowed: target tpu_vm"),
        ({"google": {"zone": None}}, "google.zone=None is not allowed: target tpu_vm needs it"),
        ({"tpu": {"slices": 2}}, "tpu.slices=2 is not allowed: 1 for tpu_vm"),
    ],
)
def test_mistakes(sections, message):
    with pytest.raises(ConfigError) as error:
        tpu_vm.render(launches.launch(**sections))
    assert str(error.value).startswith(message)
