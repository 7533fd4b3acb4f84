"""What a sweep's runs gave, a line a run: results.csv."""

import csv
import fcntl
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.compare_runs import SUMMARY_FILE, read_json
from scripts.sweep_plan import SweepRun
from scripts.sweep_queue import Status, status_of
from sira_jax.files import naming, write_text

RESULTS_FILE = "results.csv"
LOCK_FILE = "results.lock"
_SUMMARY = ("trained_parameters", "base_parameters", "steps", "tokens", "seconds_per_step")


def write_results(workdir: Path, runs: Sequence[SweepRun]) -> Path:
    """Writes results.csv; what a run has not is an empty cell, and `state` and `reason` say why."""
    # One after another: what was read first must not replace what was read later.
    with naming(workdir / LOCK_FILE), (workdir / LOCK_FILE).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _write(workdir / RESULTS_FILE, runs)


def _write(path: Path, runs: Sequence[SweepRun]) -> Path:
    lines = [_line(run, status_of(run)) for run in runs]
    header = dict.fromkeys(name for line in lines for name in line)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(header), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, buffer.getvalue())
    return path


def _line(run: SweepRun, status: Status) -> dict[str, Any]:
    evaluation = (read_json(run.evaluation_file) or {}) if status.state == "done" else {}
    summary = (read_json(run.directory / SUMMARY_FILE) or {}) if status.state == "done" else {}
    return {
        "run": run.name,
        "state": status.state,
        "reason": status.reason,
        "attempts": status.attempts,
        "seconds": round(status.seconds, 1),
        "config": run.config,
        "method": run.method,
        "seed": run.seed,
        "tasks": " ".join(run.experiment.data.tasks),
        **{field: _plain(value) for field, value in run.overrides.items()},
        **{name: summary.get(name, "") for name in _SUMMARY},
        **_measures(evaluation),
    }


def _measures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The losses and the mean scores."""
    losses = {name: x for name, x in evaluation.get("losses", {}).items() if name.count("/") == 1}
    return losses | {f"mean {name}": x for name, x in evaluation.get("mean", {}).items()}


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
