"""Two runs in one directory, changed data, and SIGTERM."""

import signal
import socket
import time

import numpy as np
import pytest

from sira_jax.training.run_lock import LOCK_FILE
from tests.faults.runs import finish, the_error, wait_until
from tests.finished_runs import assert_same_run, steps

pytestmark = pytest.mark.faults


def test_a_second_run_in_the_same_directory_is_refused(lab, unbroken, tmp_path, say):
    first = lab.train(tmp_path)
    assert wait_until(lambda: bool(steps(tmp_path)), first)
    first.send_signal(signal.SIGSTOP)
    second = lab.done(tmp_path)
    status, _, err = second
    error = the_error(err)
    assert status == 2
    assert error.startswith(
        f"{tmp_path}: another run works here (process {first.pid} on {socket.gethostname()}, "
    )
    say(error.replace(str(tmp_path), "RUN"))
    first.send_signal(signal.SIGCONT)
    # One that waits goes on where the first was killed.
    third = lab.train(tmp_path, "--lock_patience=600")
    time.sleep(3)
    first.kill()
    finish(first)
    status, _, err = finish(third)
    assert status == 0, err
    assert_same_run(tmp_path, unbroken())
    assert (tmp_path / LOCK_FILE).exists()


def test_changed_data_are_refused_by_the_name_of_the_file(lab, tmp_path, say):
    process = lab.train(tmp_path)
    assert wait_until(lambda: bool(steps(tmp_path)), process)
    process.kill()
    finish(process)
    known = steps(tmp_path)
    try:
        lab.write_data('{"question": "What is 1 and 1?", "answer": "2\\n#### 2"}\n')
        status, _, err = lab.done(tmp_path)
        assert status == 2, err
        error = the_error(err)
        assert error.startswith("data file gsm8k/train.jsonl has changed since")
        say(error)
        assert steps(tmp_path) == known
        status, _, err = lab.done(tmp_path, "--allow_changed_data")
        assert status == 0, err
        assert "data file gsm8k/train.jsonl has changed" in err
    finally:
        lab.write_data()


def test_sigterm_at_random_moments_exits_0_and_costs_nothing(lab, unbroken, tmp_path, say):
    random = np.random.default_rng(5)
    stopped = []
    for number in range(5):
        process = lab.train(tmp_path)
        newest = max(steps(tmp_path), default=0)
        if number < 2:
            # Before the first step.
            time.sleep(random.uniform(4, 9))
        else:
            wait_until(lambda: max(steps(tmp_path), default=0) > newest, process)  # noqa: B023
            time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGTERM)
        status, out, err = finish(process)
        # While Python starts it has no handler yet.
        assert status in (0, -15) if number < 2 else status == 0, err
        assert "Traceback" not in err
        stopped.append(out.strip().splitlines()[-1] if out.strip() else f"status {status}")
        if number >= 2:
            assert stopped[-1].startswith("stopped by SIGTERM after saving")
            assert max(steps(tmp_path)) > newest
    say(f"SIGTERM: {stopped[0]}; then at steps {steps(tmp_path)}")
    status, _, err = lab.done(tmp_path)
    assert status == 0, err
    assert_same_run(tmp_path, unbroken())
