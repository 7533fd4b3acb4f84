"""The same with two processes as one run: what one of them decides, both do."""

import signal
import socket

import numpy as np
import pytest

from sira_jax.training.multihost import LOST_STATUS
from tests.faults.runs import bad_losses, finish, the_error, wait_until
from tests.faults.test_kill import FLAGS
from tests.finished_runs import lines, steps

pytestmark = pytest.mark.faults


def start_two(lab, workdir, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        lab.train(
            workdir,
            "--multihost",
            "--multihost_patience=120",
            *flags,
            environment={
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]


def test_rewinds_kills_and_the_lock_of_two_processes(lab, unbroken, tmp_path, say):
    # A large epsilon, so that the rounding of gradients near 0 does not turn whole steps.
    flags = (
        *FLAGS["rewind"],
        "--config.optimizer.epsilon=1e-3",
        "--config.train.num_steps=60",
    )
    first = start_two(lab, tmp_path, *flags)
    assert wait_until(lambda: len(steps(tmp_path)) >= 2, first[0])
    # Another run beside it: its process 0 is refused, and tells its process 1.
    second = start_two(lab, tmp_path, *flags)
    ends = [finish(process) for process in second]
    assert [end[0] for end in ends] == [2, 2], ends
    assert f"another run works here (process {first[0].pid} on" in the_error(ends[0][2])
    assert "another run works here" in ends[1][2]
    first[1].kill()
    status, _, err = finish(first[0])
    assert status == LOST_STATUS, err
    stopped = start_two(lab, tmp_path, *flags)
    newest = max(steps(tmp_path), default=0)
    assert wait_until(lambda: max(steps(tmp_path), default=0) > newest, stopped[0])
    stopped[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in stopped]
    assert [end[0] for end in ends] == [0, 0], ends
    ends = [finish(process) for process in start_two(lab, tmp_path, *flags)]
    assert [end[0] for end in ends] == [0, 0], ends
    # Both decide alike, and as one process does, whose sums round otherwise.
    got, expected = lines(tmp_path), lines(unbroken(*flags))
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    assert bad_losses(tmp_path) == bad_losses(unbroken(*flags))
    assert bad_losses(tmp_path)[1] > 0
    worst = 0.0
    for line, other in zip(got, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
            worst = max(worst, abs(line[name] - value))
    say(f"two processes: {len(got)} lines of the log, at most {worst:.1e} from one process's")
