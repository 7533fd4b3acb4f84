"""Several processes as one run: joining them, agreeing on a stop, and ending all when one is gone.

Processes meet at the coordination service of process 0 (`jax.distributed`). On SLURM, TPU VMs, GKE and under Open MPI JAX finds
out by itself who is who; elsewhere three environment variables say it.

When a process dies, the others hang in their next collective, or JAX aborts them with a stack trace. Here each process writes a
counter into the coordination service's table and reads those of the others, and ends with one line when one stands still.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sira_jax.errors import ConfigError, SiraError, check

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# EX_TEMPFAIL of sysexits.h: nothing is wrong with the run itself, the same command goes on.
LOST_STATUS = 75
USER_ERROR = 2
_DEFECT = 1
_INTERVAL = 1.0
_SUSPICION = 8.0
_ALIVE, _FAILED = "sira_jax/alive/", "sira_jax/failed/"
_GOES_ON = "start all processes again with the same command to go on from the last checkpoint"


def is_main() -> bool:
    """Whether this is the process that logs and writes what one process writes: process 0."""
    return jax.process_index() == 0


def settings(environ: Mapping[str, str]) -> dict[str, object]:
    """Arguments of `jax.distributed.initialize` from plain environment variables; empty where none of them is set.

    Raises:
      ConfigError: some are missing or wrong; names the variable.
    """
    given = {name: environ[name] for name in (ADDRESS, COUNT, INDEX) if environ.get(name)}
    # Launchers may set the address alone and leave the rest to JAX.
    if not given or set(given) == {ADDRESS}:
        return {}
    for name in (ADDRESS, COUNT, INDEX):
        if name not in given:
            raise ConfigError(f"{name} is not set, but {', '.join(given)} is: all three are needed")
    address = given[ADDRESS]
    host, _, port = address.rpartition(":")
    is_address = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
    check(is_address, ADDRESS, address, "HOST:PORT of process 0")
    count, index = given[COUNT], given[INDEX]
    check(count.isdecimal() and int(count) > 0, COUNT, count, "a whole number over 0")
    check(index.isdecimal() and int(index) < int(count), INDEX, index, f"0 to {int(count) - 1}")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def initialize(timeout: int = 300, heartbeat: int = 100) -> None:
    """Joins this process with the others; to be called before JAX is used.

    Args:
      timeout: seconds to wait for the others.
      heartbeat: seconds without a sign of life after which JAX itself ends all processes.

    Raises:
      ConfigError: nothing says who the others are, or they do not come.
    """
    # The only collectives across processes that the CPU backend has; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would take the place of the loop's, which agrees on a stop by itself.
    jax.config.update("jax_enable_preemption_service", False)
    known = settings(os.environ)
    try:
        jax.distributed.initialize(
            **known, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:
        raise ConfigError(
            f"--multihost: neither SLURM, nor a TPU, Kubernetes or Open MPI is found here ({error}):"
            f" set {ADDRESS} (HOST:PORT of process 0), {COUNT} and {INDEX}"
        ) from None
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"--multihost: not all processes came together within {timeout} s: {reason}"
        ) from None


@contextlib.contextmanager
def joined(patience: float = 60.0, timeout: int = 300) -> Iterator[None]:
    """Runs its body as one of several processes, which all end when one does before its time.

    A mistake of the user's (SiraError) ends the process with one line and status 2, another exception with its stack trace and
    status 1, and the loss of a process with one line and status LOST_STATUS; the others are told.

    Args:
      patience: seconds without a sign of life after which a process counts as lost.
      timeout: see `initialize`.
    """
    # JAX's own end is an abort with a stack trace: the watch shall come first, also on a busy machine.
    initialize(timeout, heartbeat=100 + 2 * int(patience))
    watch = _Watch(patience)
    _explain_abort()
    watch.start()
    try:
        yield
        # Nobody leaves while others may still need the coordination service.
        _client().wait_at_barrier("sira_jax/end", timeout_in_ms=int(patience + timeout) * 1000)
    except SiraError as error:
        watch.give_up(" ".join(str(error).split()), USER_ERROR)
    except KeyboardInterrupt:
        watch.give_up("interrupted", 130)
    except Exception:
        # A collective fails with whatever its library raises, at once, while the loss itself shows only after a while.
        text = traceback.format_exc()
        watch.await_verdict()
        print(text, file=sys.stderr)
        watch.give_up(text.strip().split("\n")[-1], _DEFECT, is_told=True)
    watch.stop()
    jax.distributed.shutdown()


class _Watch:
    """A thread that gives a sign of life and ends the process when another gives none, or says that it failed."""

    def __init__(self, patience: float):
        self._patience = patience
        self._index, self._count = jax.process_index(), jax.process_count()
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        now = time.monotonic()
        self._seen = dict.fromkeys(range(self._count), ("", now))
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def give_up(self, reason: str, status: int, is_told: bool = False) -> None:
        """Prints the reason unless `is_told`, tells the others and ends the process."""
        self._stopped.set()
        if not is_told:
            _say(f"error: {reason}")
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{_FAILED}{self._index}", f"{status} {reason}", True)
        if self._index == 0:
            # The table goes with this process: the others need the time to read it.
            time.sleep(3 * _INTERVAL)
        _exit(status)

    def await_verdict(self) -> None:
        """Waits, after an error that the loss of a process explains, for what the thread finds out, and with less patience."""
        if self._count > 1:
            self._patience = min(self._patience, _SUSPICION)
            time.sleep(self._patience + 3 * _INTERVAL)

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(_INTERVAL):
            beat += 1
            try:
                _client().key_value_set(f"{_ALIVE}{self._index}", str(beat), True)
                beats = _table(_ALIVE)
                failures = _table(_FAILED)
            except jax.errors.JaxRuntimeError:
                # Process 0 is gone, or slow: JAX itself ends this process in the first case.
                continue
            self._judge(beats, failures)

    def _judge(self, beats: Mapping[int, str], failures: Mapping[int, str]) -> None:
        now = time.monotonic()
        for index, beat in beats.items():
            if self._seen[index][0] != beat:
                self._seen[index] = (beat, now)
        lost = [i for i, (_, since) in self._seen.items() if now - since > self._patience]
        others = {index: text for index, text in failures.items() if index != self._index}
        if self._stopped.is_set() or not (lost or others):
            return
        if others:
            index, text = next(iter(others.items()))
            status, _, reason = text.partition(" ")
            _say(f"error: process {index} of {self._count} stopped: {reason}")
        else:
            names = ", ".join(str(index) for index in lost)
            status = LOST_STATUS
            reason = f"no sign of life from process {names} of {self._count}; {_GOES_ON}"
            _say(f"error: {reason}")
            if self._index == 0:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    _client().key_value_set(f"{_FAILED}0", f"{status} {reason}", True)
                time.sleep(3 * _INTERVAL)
        _exit(int(status))


def _say(line: str) -> None:
    # A progress bar of another thread may stand on the line that was begun.
    print(f"\n{line}", file=sys.stderr)


def _client() -> "distributed.xla_extension.DistributedRuntimeClient":
    return distributed.global_state.client


def _table(folder: str) -> dict[int, str]:
    entries = _client().key_value_dir_get(folder)
    return {int(name.rpartition("/")[2]): value for name, value in entries}


def _exit(status: int) -> None:
    # Not sys.exit: JAX would wait for all processes to leave, some of which never will.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_HANDLER
def _on_abort(number: int) -> None:
    del number
    line = f"error: JAX gave up, most likely since process 0 is gone; {_GOES_ON}\n"
    os.write(2, line.encode())
    os._exit(LOST_STATUS)


def _explain_abort() -> None:
    """Adds a line to what JAX aborts with when the coordination service is gone, for which it has no other hook."""
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


class StopVote:
    """Agrees in each step whether to stop, so that all processes save the same one.

    Args:
      mesh: all devices.
    """

    def __init__(self, mesh: Mesh):
        self._is_alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        # Each device has its own number, all get the largest.
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, received: Callable[[], str | None]) -> Callable[[], str | None]:
        """Starts the vote; the result, called after the step, is the name of a signal that any process was sent, or None.

        Args:
          received: the name of the signal that this process was sent so far, or None. One process alone asks at the end.
        """
        if self._is_alone:
            return received
        signal_name = received()
        number = 0 if signal_name is None else int(signal.Signals[signal_name])
        votes = jax.make_array_from_callback(
            (self._size,), self._sharding, lambda index: np.full(1, number, np.int32)
        )
        largest = self._largest(votes)

        def result() -> str | None:
            agreed = int(largest)
            return signal.Signals(agreed).name if agreed else None

        return result
