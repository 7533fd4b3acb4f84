"""What a run directory holds, read back for the report: checked, and grouped by task and language.

Axis letters: L layers, E experts, Z tasks.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import babel
import numpy as np

from sira_jax import json_text
from sira_jax.errors import ConfigError, DataError
from sira_jax.files import read_bytes
from sira_jax.training.logging import METRICS_FILE, read_metrics

SUMMARY_FILE = "summary.json"
# The score that says whether an example is right, the first that a task has; then any other.
PRIMARY_METRICS = (
    "ast_match",
    "execution_accuracy",
    "number_match",
    "span_f1",
    "f1",
    "rougeL",
    "sequence_accuracy",
    "exact_match",
)
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_ROUTER_RANKS = {
    "expert_load": 2,
    "gate_entropy": 1,
    "dropped_share": 1,
    "router_confidence": 1,
    "task_expert_load": 3,
    "task_gate_entropy": 2,
    "task_tokens": 2,
}


@dataclass(frozen=True)
class Projection:
    """What the routers of one projection did.

    Attributes:
      name: path in a layer, such as "attention/q".
      statistics: those of `sira_jax.training.evaluate.router_report`: expert_load (L, E),
        gate_entropy (L,) in nats, dropped_share (L,), router_confidence (L,), and with several
        tasks task_expert_load (L, Z, E), task_gate_entropy (L, Z), task_tokens (L, Z).
    """

    name: str
    statistics: Mapping[str, np.ndarray]

    @property
    def relative_load_LE(self) -> np.ndarray:
        """Load as a multiple of an even load, which is 1."""
        load_LE = self.statistics["expert_load"]
        return load_LE * load_LE.shape[-1]


@dataclass(frozen=True)
class Router:
    """A run's router report: names of the tasks, and the projections in the order of a layer."""

    tasks: tuple[str, ...]
    projections: tuple[Projection, ...]

    @property
    def alike(self) -> tuple[Projection, ...]:
        """The projections over which a mean exists: those with the commonest (layers, experts)."""
        shapes = [p.statistics["expert_load"].shape for p in self.projections]
        commonest = max(shapes, key=shapes.count)
        return tuple(p for p, s in zip(self.projections, shapes, strict=True) if s == commonest)


@dataclass(frozen=True)
class Run:
    """The results of one method. What its directory does not hold is None.

    Attributes:
      name: how the report calls it.
      split: split that the results are of.
      metrics: lines of metrics.jsonl.
      summary: sizes, time of a step and peak memory.
      evaluation: losses and scores.
      predictions: (task, input, target) -> predicted text, in the order of the file.
      router: what the routers did.
    """

    name: str
    split: str
    metrics: list[dict[str, Any]] | None
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    predictions: dict[tuple[str, str, str], str] | None
    router: Router | None

    @property
    def frozen(self) -> bool:
        """Whether nothing was trained."""
        if self.summary is not None and "trained_parameters" in self.summary:
            return self.summary["trained_parameters"] == 0
        return self.evaluation is not None and self.evaluation.get("checkpoint") == "none"

    @property
    def method(self) -> str:
        """The adapter's name; the run's own where summary.json does not say."""
        return str((self.summary or {}).get("method", self.name))

    @property
    def tasks(self) -> list[str]:
        """Names of the evaluated tasks."""
        return list(self.evaluation["scores"]) if self.evaluation else []

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, without those that are no finite number."""
        points = [
            (line["step"], line[name])
            for line in self.metrics or []
            if isinstance(line.get(name), int | float) and math.isfinite(line[name])
        ]
        return [step for step, _ in points], [value for _, value in points]


def read_runs(runs: Mapping[str, str | Path], split: str = "test") -> list[Run]:
    """Reads run directories.

    Raises:
      ConfigError: there is none, or a name is not one of letters, digits and . _ + -.
      DataError: a directory is missing, or a file in it is damaged; names the file.
    """
    if not runs:
        raise ConfigError("no runs: give at least one name=directory")
    for name in runs:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise ConfigError(
                f"run name {name!r} is not allowed: use letters, digits and . _ + -, a letter or"
                " digit first"
            )
    return [read_run(name, Path(directory), split) for name, directory in runs.items()]


def read_run(name: str, directory: Path, split: str = "test") -> Run:
    """Reads one run directory; see `read_runs`."""
    if not directory.is_dir():
        raise DataError(f"{directory}: the directory of run {name!r} does not exist")

    def read(file: str, reader: Callable[[Path], Any]) -> Any:
        path = directory / file
        if not path.exists():
            return None
        try:
            return reader(path)
        except (OSError, ValueError, RecursionError) as error:
            # UnicodeDecodeError and json.JSONDecodeError are ValueErrors, as is DataError.
            raise DataError(f"{path}: is damaged: {error}") from error

    return Run(
        name=name,
        split=split,
        metrics=read(METRICS_FILE, _read_metrics),
        summary=read(SUMMARY_FILE, _read_summary),
        evaluation=read(
            f"evaluation_{split}.json", lambda path: _read_evaluation(path, f"{split}/loss")
        ),
        predictions=read(f"predictions_{split}.jsonl", _read_predictions),
        router=read(f"router_{split}.json", _read_router),
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = read_metrics(path.parent)
    _require(bool(lines) or path.stat().st_size == 0, "no line of it is JSON")
    for line in lines:
        valid = isinstance(line, dict) and _is_number(line.get("step"))
        _require(valid, f"the line {json.dumps(line)[:60]} has no step")
    return lines


def _read_summary(path: Path) -> dict[str, Any]:
    summary = json_text.parse(read_bytes(path))
    _require(isinstance(summary, dict), "it is no object")
    for field, value in summary.items():
        valid = isinstance(value, str) if field == "method" else _is_number(value)
        _require(valid, f"{field}={value!r} has the wrong type")
    return summary


def _read_evaluation(path: Path, loss: str) -> dict[str, Any]:
    evaluation = json_text.parse(read_bytes(path))
    _require(isinstance(evaluation, dict), "it is no object")
    for section in ("examples", "losses", "scores", "mean"):
        _require(isinstance(evaluation.get(section), dict), f"it has no object {section!r}")
    _require(loss in evaluation["losses"], f"its losses have no {loss!r}")
    tables = {
        "examples": evaluation["examples"],
        "losses": evaluation["losses"],
        "mean": evaluation["mean"],
    }
    for task, scores in evaluation["scores"].items():
        _require(isinstance(scores, dict), f"scores[{task!r}] is no object")
        tables[f"scores[{task!r}]"] = scores
    for section, values in tables.items():
        for key, value in values.items():
            _require(_is_number(value), f"{section}[{key!r}]={value!r} is no number")
    return evaluation


def _read_predictions(path: Path) -> dict[tuple[str, str, str], str]:
    predictions = {}
    for number, line in enumerate(read_bytes(path).decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json_text.parse(line)
        except ValueError as error:
            raise DataError(f"line {number}: {error}") from error
        _require(isinstance(record, dict), f"line {number}: it is no object")
        for field in ("task", "input", "target", "prediction"):
            _require(isinstance(record.get(field), str), f"line {number}: it has no text {field!r}")
        key = (record["task"], record["input"], record["target"])
        predictions[key] = record["prediction"]
    return predictions


def _read_router(path: Path) -> Router:
    report = json_text.parse(read_bytes(path))
    valid = isinstance(report, dict) and isinstance(report.get("tasks"), list)
    _require(valid, "it has no list 'tasks'")
    projections = report.get("projections")
    _require(isinstance(projections, dict) and bool(projections), "it has no projections")
    tasks = tuple(map(str, report["tasks"]))
    found = []
    for name in sorted(projections, key=_layer_order):
        _require(isinstance(projections[name], dict), f"{name}: it is no object")
        statistics = {
            field: _numbers(f"{name}: {field}", values)
            for field, values in projections[name].items()
            if field in _ROUTER_RANKS
        }
        missing = [f for f in _ROUTER_RANKS if not f.startswith("task_") and f not in statistics]
        _require(not missing, f"{name}: it has no {', '.join(missing)}")
        load_shape = statistics["expert_load"].shape
        layers, experts = load_shape[:1], load_shape[1:]
        by_task = (*layers, len(tasks))
        shapes = {
            "expert_load": load_shape,
            "task_expert_load": (*by_task, *experts),
            "task_gate_entropy": by_task,
            "task_tokens": by_task,
        }
        for field, values in statistics.items():
            valid = values.ndim == _ROUTER_RANKS[field] and values.size > 0
            valid = valid and values.shape == shapes.get(field, layers)
            _require(valid, f"{name}: {field} has the shape {values.shape}")
        found.append(Projection(name, statistics))
    return Router(tasks, tuple(found))


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{name} is no array of numbers ({error})") from None


def _layer_order(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (_PROJECTIONS.index(last) if last in _PROJECTIONS else len(_PROJECTIONS), name)


def split_task(task: str) -> tuple[str, str | None]:
    """A task's group and language: cldr_date_sw -> (cldr_date, sw); bfcl_simple -> (itself, None).

    A language is a last part of two or three letters that Unicode's locale data know.
    """
    group, _, last = task.rpartition("_")
    if group and re.fullmatch("[a-z]{2,3}", last) and babel.localedata.exists(last):
        return group, last
    return task, None


def language_name(code: str) -> str:
    """sw -> Swahili."""
    return babel.Locale("en").languages.get(code, code)


def group_tasks(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Tasks by group, in the order of their first member."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(split_task(task)[0], []).append(task)
    return groups


def group_languages(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Tasks by language, without those that have none."""
    languages: dict[str, list[str]] = {}
    for task in tasks:
        language = split_task(task)[1]
        if language:
            languages.setdefault(language, []).append(task)
    return languages


def all_tasks(runs: Sequence[Run]) -> list[str]:
    """The tasks of all runs, each once."""
    return list(dict.fromkeys(task for run in runs for task in run.tasks))


def metrics_of(runs: Sequence[Run], tasks: Sequence[str]) -> set[str]:
    """The metrics that some run has for some of these tasks."""
    return {
        metric
        for run in runs
        if run.evaluation
        for task in tasks
        for metric in run.evaluation["scores"].get(task, {})
    }


def primary_metric(runs: Sequence[Run], tasks: Sequence[str]) -> str | None:
    """The metric that counts for these tasks, or None where they have no score."""
    found = metrics_of(runs, tasks)
    return next((m for m in (*PRIMARY_METRICS, *sorted(found)) if m in found), None)


def group_score(run: Run, metric: str, tasks: Sequence[str]) -> float | None:
    """Mean of a metric over those of `tasks` that have it, or None."""
    scores = run.evaluation["scores"] if run.evaluation else {}
    values = [scores[t][metric] for t in tasks if metric in scores.get(t, {})]
    return sum(values) / len(values) if values else None


def is_right(prediction: str, target: str) -> bool:
    """Whether a prediction is its target, as exact match counts it."""
    return prediction.strip() == target.strip()
