"""The runs of a comparison: which there are, which are done, and doing the others, each in processes of its own.

A comparison's directory holds METHOD/seedN, a run directory each, as scripts/train.py and scripts/evaluate.py make them, with
log.txt (what those printed) and, where a run failed, failure.json.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.run_results import SUMMARY_FILE
from sira_jax import json_text
from sira_jax.errors import CheckpointError, ConfigError, DataError
from sira_jax.files import naming, read_bytes, write_text
from sira_jax.training import loop
from sira_jax.training.config import ExperimentConfig, make_experiment
from sira_jax.training.resumable import check_resumable

SCRIPTS = Path(__file__).resolve().parent
FAILURE_FILE = "failure.json"
LOG_FILE = "log.txt"
PLAN_FILE = "plan.json"
COSTS_FILE = "costs.json"


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run: a method with a seed. Without an adapter it is the frozen model, which is evaluated alone."""

    method: str
    seed: int
    directory: Path
    experiment: ExperimentConfig

    @property
    def name(self) -> str:
        """What progress lines call it."""
        return f"{self.method} seed {self.seed}" if self.experiment.adapter else self.method

    @property
    def evaluation_file(self) -> Path:
        """Where the results are."""
        return self.directory / f"evaluation_{self.experiment.evaluate.split}.json"

    def is_done(self) -> bool:
        """Whether the directory holds the training's summary and the evaluation of this very experiment."""
        evaluation = read_json(self.evaluation_file)
        if evaluation is None or (self.experiment.adapter and not self.is_trained()):
            return False
        try:
            saved = make_experiment(evaluation["experiment"])
        except (ConfigError, KeyError, TypeError):
            return False
        return saved == self.experiment

    def is_trained(self) -> bool:
        """Whether the training went to its end; `check_resumable` says whether it is this experiment's."""
        return (self.directory / SUMMARY_FILE).exists() and self._has_checkpoint()

    def _has_checkpoint(self) -> bool:
        folder = self.directory / loop.CHECKPOINTS
        return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())

    def check_resumable(self) -> None:
        """Raises CheckpointError if the directory holds checkpoints of another experiment, naming the field."""
        if not self._has_checkpoint():
            return
        path = self.directory / loop.CONFIG_FILE
        saved = read_json(path)
        if saved is None or "config" not in saved:
            raise CheckpointError(f"{path} is missing or damaged: use another --workdir")
        check_resumable(saved["config"], self.experiment.to_dict(), path)

    def failure(self) -> str | None:
        """Why there is no result; None where there is one."""
        if self.is_done():
            return None
        failure = read_json(self.directory / FAILURE_FILE)
        return failure["reason"] if failure else "was not run yet"


def read_json(path: Path) -> Any | None:
    """The content of a JSON file, None where there is none that can be read."""
    try:
        return json_text.parse(read_bytes(path))
    except (OSError, ValueError):
        return None


def seed_major(by_method: dict[str, Sequence[RunSpec]]) -> list[RunSpec]:
    """All methods with their first seed, then with their second: stopped early, it still compares all methods."""
    most = max(map(len, by_method.values()))
    return [runs[i] for i in range(most) for runs in by_method.values() if i < len(runs)]


def save_plan(workdir: Path, settings: dict[str, Any], by_method: dict[str, list[RunSpec]]) -> None:
    """Writes plan.json, from which `load_plan` makes the runs again."""
    runs = {
        method: [[run.seed, run.experiment.to_dict()] for run in runs]
        for method, runs in by_method.items()
    }
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / PLAN_FILE, json.dumps({"settings": settings, "runs": runs}, indent=1))


def load_plan(workdir: Path) -> tuple[dict[str, Any], dict[str, list[RunSpec]]]:
    """The settings and runs that `save_plan` wrote.

    Raises:
      DataError: there is no such file, or it is damaged or of another version.
    """
    path = workdir / PLAN_FILE
    plan = read_json(path)
    if plan is None:
        raise DataError(f"{path}: there is no comparison in this directory")
    try:
        by_method = {
            method: [
                RunSpec(method, seed, run_directory(workdir, method, seed), make_experiment(fields))
                for seed, fields in runs
            ]
            for method, runs in plan["runs"].items()
        }
        return plan["settings"], by_method
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is damaged or of another version: {error}") from None


def first_experiments(specs: Sequence[RunSpec]) -> dict[str, Any]:
    """Method -> experiment as JSON has it: what measured costs belong to."""
    return json.loads(json.dumps({spec.method: spec.experiment.to_dict() for spec in specs}))


def run_directory(workdir: Path, method: str, seed: int) -> Path:
    """METHOD/seedN."""
    return workdir / method / f"seed{seed}"


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, after the process under way has saved and ended."""


class Runner:
    """Runs scripts one after another and prints how far they are. A context manager, which handles the signals.

    Either signal goes on to the process under way as SIGTERM, which makes a training save and end; then `Stopped` is raised.

    Args:
      specs: all the runs, in their order.
      cache: directory of JAX's compilation cache, for what all runs compile alike.
    """

    def __init__(self, specs: Sequence[RunSpec], cache: Path):
        # File descriptors that the processes keep open, such as a lock that must outlive this one.
        self.keep_open: tuple[int, ...] = ()
        self._total, self._place = len(specs), 0
        self._left = sum(not spec.is_done() for spec in specs)
        self._seconds: list[float] = []
        self._cache = cache
        self._child: subprocess.Popen | None = None
        self._stop = False
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self._stop = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def call(self, script: str, *arguments: str, log: Path, cached: bool = False) -> str | None:
        """Runs a script to its end, its output going to `log`; returns the reason if it failed, else None."""
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": str(cached).lower()}
        if cached:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self._cache.resolve())
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        self._check_stopped()
        with naming(log), log.open("a") as file:
            command = [sys.executable, str(SCRIPTS / script), *arguments]
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            self._child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=self.keep_open,
            )
            if self._stop:  # The signal came before the process could be told.
                self._child.send_signal(signal.SIGTERM)
            status = self._child.wait()
            self._child = None
        self._check_stopped()
        return None if status == 0 else _reason(script, status, log)

    def _check_stopped(self) -> None:
        if self._stop:
            print("stopped; the same command goes on from here", flush=True)
            raise Stopped

    def run(self, spec: RunSpec) -> None:
        """Does one run, or says that it is done already; a failure is kept in the run directory."""
        self._place += 1
        head = f"[{self._place}/{self._total}] {spec.name}"
        if spec.is_done():
            print(f"{head}: done before, in {spec.directory}", flush=True)
            return
        start = time.monotonic()
        print(f"{head}: log in {spec.directory / LOG_FILE}", flush=True)
        reason = self.do(spec)
        seconds = time.monotonic() - start
        self._seconds.append(seconds)
        self._left -= 1
        left = self._left * sum(self._seconds) / len(self._seconds)
        state = f"FAILED ({reason})" if reason else "done"
        print(f"{head}: {state} after {seconds:.0f} s; about {duration(left)} left", flush=True)

    def do(self, spec: RunSpec) -> str | None:
        """Does what is missing of one run. Returns why it failed, which is kept in the run directory, else None."""
        reason = self._train_and_evaluate(spec)
        if reason:
            write_text(spec.directory / FAILURE_FILE, json.dumps({"reason": reason}))
        return reason

    def _train_and_evaluate(self, spec: RunSpec) -> str | None:
        spec.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (spec.directory / FAILURE_FILE).unlink()
        log, directory = spec.directory / LOG_FILE, f"--workdir={spec.directory}"
        # The scripts find their experiment here. What may differ from an earlier call is how it is evaluated.
        file = spec.directory / loop.CONFIG_FILE
        config = (read_json(file) or {}) | {"config": spec.experiment.to_dict()}
        write_text(file, json.dumps(config, indent=1) + "\n")
        trained = spec.experiment.adapter is not None
        if trained and not spec.is_trained():
            # Without the compilation cache: a run that finds its steps compiled would show a lower peak of memory.
            reason = self.call("train.py", directory, "--tensorboard=false", log=log)
            if reason:
                return reason
            if not spec.is_trained():
                return "the training was stopped by a signal; the same command goes on"
        checkpoint = f"--checkpoint={'latest' if trained else 'none'}"
        reason = self.call("evaluate.py", directory, checkpoint, log=log, cached=True)
        if reason is None and not spec.is_done():
            reason = f"{spec.evaluation_file} is not of this experiment"
        return reason


def _reason(script: str, status: int, log: Path) -> str:
    """The last line that a failed script printed, which is its error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    cause = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{script} ended with {cause}: {lines[-1][:300]}"


def duration(seconds: float) -> str:
    """A time as progress lines show it."""
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
