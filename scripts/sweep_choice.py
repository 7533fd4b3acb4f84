"""Which setting of each method was best in a sweep: chosen.json, which another sweep takes by --chosen."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.compare_runs import read_json
from scripts.sweep_plan import SweepRun
from sira_jax.errors import ConfigError, DataError
from sira_jax.files import write_text

CHOSEN_FILE = "chosen.json"
# What is no setting of the method.
_NOT_CHOSEN = ("train.seed", "evaluate.", "data.", "model.", "decode.")


def choose(workdir: Path, runs: Sequence[SweepRun], measure: str) -> Path:
    """Writes for each method the overrides with the best mean over seeds and tasks.

    Args:
      workdir: the sweep's directory.
      runs: all of the sweep, all done: a choice among some would not be one on equal terms.
      measure: "SPLIT/loss", of which less is better, or the name of a mean score, of which more is.

    Raises:
      DataError: a run is not done or has no such measure, or a method has no override to choose.
    """
    by_method: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.experiment.adapter is None:
            continue
        if not run.is_done():
            raise DataError(
                f"--choose={measure}: {run.name} {run.failure()}; all runs must be done"
            )
        value = _measure(run, measure)
        setting = json.dumps(_setting(run), sort_keys=True)
        by_method.setdefault(run.method, {}).setdefault(setting, []).append(value)
    sign = 1 if measure.endswith("/loss") else -1
    chosen = {}
    for method, found in by_method.items():
        means = {setting: statistics.fmean(values) for setting, values in found.items()}
        best = min(means, key=lambda setting, means=means: (sign * means[setting], setting))
        if best == "{}":
            raise DataError(f"--choose={measure}: the runs of {method} set nothing to choose among")
        chosen[method] = {"overrides": json.loads(best), "value": means[best], "tried": means}
    path = workdir / CHOSEN_FILE
    write_text(path, json.dumps({"measure": measure, "methods": chosen}, indent=1) + "\n")
    return path


def _setting(run: SweepRun) -> dict[str, Any]:
    return {n: v for n, v in run.overrides.items() if not n.startswith(_NOT_CHOSEN)}


def _measure(run: SweepRun, measure: str) -> float:
    evaluation = read_json(run.evaluation_file) or {}
    value = {**evaluation.get("losses", {}), **evaluation.get("mean", {})}.get(measure)
    if value is None or not math.isfinite(value):
        names = ", ".join([*evaluation.get("losses", {}), *evaluation.get("mean", {})])
        raise DataError(f"--choose={measure}: {run.name} has {value}; it has {names}")
    return value


def read_chosen(path: str | Path) -> Mapping[str, Mapping[str, Any]]:
    """Method -> overrides of a chosen.json. Raises ConfigError where the file is none."""
    content = read_json(Path(path))
    try:
        return {name: dict(entry["overrides"]) for name, entry in content["methods"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"--chosen={path}: is no {CHOSEN_FILE} of scripts/sweep.py") from None
