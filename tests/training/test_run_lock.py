"""One run at a time in a run directory, and no lock that outlives its run."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from sira_jax.errors import LockedError
from sira_jax.training import run_lock


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    workdir = tmp_path / "new" / "run"
    with run_lock.held(workdir):
        with pytest.raises(LockedError) as error, run_lock.held(workdir):
            pass
        pattern = (
            rf"{re.escape(str(workdir))}: another run works here \(process {os.getpid()} on {re.escape(socket.gethostname())},"
            r" since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\): .* --workdir"
        )
        assert re.fullmatch(pattern, str(error.value))
        # The refusal takes nothing from the first.
        with pytest.raises(LockedError), run_lock.held(workdir):
            pass
        with run_lock.held(tmp_path / "other"):
            pass
    with run_lock.held(workdir):
        pass


def test_an_error_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock.held(tmp_path):
        raise ZeroDivisionError
    with run_lock.held(tmp_path):
        pass


def test_a_killed_holder_leaves_no_lock(tmp_path):
    program = (
        "import sys, time; from sira_jax.training import run_lock\n"
        "with run_lock.held(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {child.pid} on"), run_lock.held(tmp_path):
        pass
    child.kill()
    child.wait()
    with run_lock.held(tmp_path):
        pass


def test_patience_waits_for_the_end_of_the_first(tmp_path):
    first = run_lock.held(tmp_path)
    first.__enter__()
    end = threading.Timer(0.2, first.__exit__, (None, None, None))
    end.start()
    with run_lock.held(tmp_path, patience=30):
        assert end.finished.is_set()
    end.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock.held(tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: {tmp_path / run_lock.LOCK_FILE}: the file system has no locks"
    )
