"""A sweep's runs as a queue that any number of processes work on: each run is done by one of them, and never twice.

A run directory holds, besides what a run has, `lock` (held by the process that works on it, and by the training it started, so
that it ends with them whatever ends them) and attempts.jsonl (a line when an attempt starts, and one when it ends).
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.compare_runs import LOG_FILE, Runner, duration
from scripts.sweep_plan import SweepRun
from sira_jax.files import naming

LOCK_FILE = "lock"
ATTEMPTS_FILE = "attempts.jsonl"
CACHE = "compilation_cache"
STATES = ("done", "running", "failed", "stopped", "waiting")


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a run is.

    Attributes:
      state: one of STATES; "stopped" was begun and goes on from its last checkpoint.
      reason: why it failed, else "".
      attempts: how often it was begun.
      seconds: what the attempts that ended took together.
    """

    state: str
    reason: str
    attempts: int
    seconds: float


def status_of(run: SweepRun) -> Status:
    """Looks at the run's directory."""
    events = _read_events(run)
    attempts = sum(event["event"] == "start" for event in events)
    seconds = sum(event.get("seconds", 0.0) for event in events)
    reason = run.failure()
    state = "done"
    if reason is not None:
        failed = bool(events) and events[-1].get("outcome") == "failed"
        state = "failed" if failed else "stopped" if attempts else "waiting"
        if _is_locked(run):
            state = "running"
    return Status(state, reason if state == "failed" else "", attempts, seconds)


def work(
    runs: Sequence[SweepRun],
    workdir: Path,
    queue: str,
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """Does what is not done, in order, but for what other processes work on; a run is begun once by each `queue`.

    Args:
      runs: of the sweep in `workdir`.
      workdir: the sweep's directory.
      queue: a name that the workers of one call of the script share, so that none repeats a failure of another.
      after_each: called when a run is done or has failed, so that what is written of them is there while others run.

    Raises:
      compare_runs.Stopped: a signal came; the run under way has saved.
    """
    spent = []
    with Runner(runs, workdir / CACHE) as runner:
        for place, run in enumerate(runs, start=1):
            head = f"[{place}/{len(runs)}] {run.name}"
            if run.is_done():
                continue
            with _locked(run) as lock:
                if lock is None:
                    print(f"{head}: another process works on it", flush=True)
                    continue
                begun = any(event["queue"] == queue for event in _read_events(run))
                if begun or run.is_done():
                    continue
                print(f"{head}: log in {run.directory / LOG_FILE}", flush=True)
                runner.keep_open = (lock,)
                reason, seconds = _attempt(runner, run, queue)
            after_each()
            spent.append(seconds)
            left = sum(not r.is_done() for r in runs[place:]) * sum(spent) / len(spent)
            state = f"FAILED ({reason})" if reason else "done"
            print(
                f"{head}: {state} after {duration(seconds)}; {duration(left)} of work left",
                flush=True,
            )


def _attempt(runner: Runner, run: SweepRun, queue: str) -> tuple[str | None, float]:
    start = time.time()
    _add_event(run, {"event": "start", "queue": queue, "time": start})
    outcome = "stopped"
    try:
        reason = runner.do(run)
        outcome = "failed" if reason else "done"
    finally:
        seconds = time.time() - start
        end = {"event": "end", "queue": queue, "outcome": outcome, "seconds": seconds}
        _add_event(run, end)
    return reason, seconds


@contextlib.contextmanager
def _locked(run: SweepRun) -> Iterator[int | None]:
    """Holds the run's lock and gives its file descriptor; None where another process holds it."""
    with naming(run.directory):
        run.directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(run.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield lock if _try_lock(lock, fcntl.LOCK_EX) else None
    finally:
        os.close(lock)


def _try_lock(lock: int, kind: int) -> bool:
    # More than once: asking for the status holds the lock for a moment too.
    for wait in (0.05, 0.1, 0.2, None):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        if wait and kind == fcntl.LOCK_EX:
            time.sleep(wait)
    return False


def _is_locked(run: SweepRun) -> bool:
    try:
        lock = os.open(run.directory / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)


def _add_event(run: SweepRun, event: dict[str, Any]) -> None:
    path = run.directory / ATTEMPTS_FILE
    with naming(path), path.open("a") as file:
        file.write(json.dumps(event) + "\n")


def _read_events(run: SweepRun) -> list[dict[str, Any]]:
    try:
        lines = (run.directory / ATTEMPTS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        # A kill can leave a torn line.
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events
