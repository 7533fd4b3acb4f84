"""Run directories as the cells of a table: which run belongs to which row and column, and why a cell is empty.

A row is a method with its adapter's fields, a column a set of tasks, and the runs of a cell differ in the seed alone.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.compare_runs import PLAN_FILE, RunSpec, load_plan, read_json
from scripts.compare_table import Interval, interval
from scripts.run_results import (
    Run,
    group_languages,
    group_score,
    group_tasks,
    language_name,
    primary_metric,
    read_run,
)
from scripts.sweep_plan import PLAN_FILE as SWEEP_FILE
from scripts.sweep_plan import load_sweep
from sira_jax.errors import ConfigError, DataError
from sira_jax.training import loop
from sira_jax.training.config import ExperimentConfig, make_experiment

MEAN = "mean"
LACKING = "has no finite value of it"
FROZEN = "none"
# What does not change a result, or is the seed: the runs of a cell may differ in these.
_FREE = {
    "train": ("seed", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"),
    "evaluate": ("loss_examples_per_task",),
    "mesh": ("data", "fsdp", "tensor", "expert"),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run directory: its experiment, and its results or the reason why there are none."""

    directory: Path
    experiment: ExperimentConfig
    run: Run | None
    reason: str = ""

    @property
    def method(self) -> str:
        """The adapter's name, "none" for the frozen model."""
        return self.experiment.adapter.method if self.experiment.adapter else FROZEN

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.experiment.train.seed


def find_trials(roots: Iterable[str | Path]) -> list[Trial]:
    """The run directories under `roots`, and those that a sweep or comparison there has still to make.

    Raises:
      DataError: a root is missing, holds no run, or a file in it is damaged; names the file.
    """
    trials: dict[Path, Trial] = {}
    for root in map(Path, roots):
        if not root.is_dir():
            raise DataError(f"{root}: the directory does not exist")
        before = len(trials)
        for path in sorted(root.rglob(loop.CONFIG_FILE)) + sorted(root.rglob("evaluation_*.json")):
            directory = path.parent
            inside = directory.relative_to(root).parts
            if loop.CHECKPOINTS in inside or directory in trials:
                continue
            if (experiment := _read_experiment(path)) is not None:
                trials[directory] = _read_trial(directory, experiment)
        for directory, experiment in _planned(root):
            trials.setdefault(directory, Trial(directory, experiment, None, "was not run yet"))
        if len(trials) == before:
            raise DataError(f"{root}: there is no run directory in it")
    return list(trials.values())


def _read_experiment(path: Path) -> ExperimentConfig | None:
    """The experiment in config.json or evaluation_SPLIT.json; None where the file is of something else."""
    content = read_json(path)
    if content is None:
        raise DataError(f"{path}: is damaged")
    fields = content.get("config", content.get("experiment")) if isinstance(content, dict) else None
    if fields is None:
        return None
    try:
        return make_experiment(fields)
    except ConfigError as error:
        raise DataError(f"{path}: is damaged or of another version: {error}") from None


def _read_trial(directory: Path, experiment: ExperimentConfig) -> Trial:
    spec = RunSpec("", experiment.train.seed, directory, experiment)
    reason = spec.failure()
    if reason is not None:
        if reason == "was not run yet":
            reason = _why_unfinished(spec)
        return Trial(directory, experiment, None, reason)
    return Trial(directory, experiment, read_run("run", directory, experiment.evaluate.split))


def _why_unfinished(spec: RunSpec) -> str:
    if not spec.evaluation_file.exists():
        return "is not finished"
    if read_json(spec.evaluation_file) is None:
        return f"{spec.evaluation_file.name} is damaged"
    if spec.experiment.adapter is not None and not spec.is_trained():
        return "its training is not finished"
    return f"{spec.evaluation_file.name} is of another experiment"


def _planned(root: Path) -> list[tuple[Path, ExperimentConfig]]:
    """Runs that sweep.json and plan.json files promise."""
    found = []
    for path in sorted(root.rglob(SWEEP_FILE)):
        found += [(run.directory, run.experiment) for run in load_sweep(path.parent).runs]
    for path in sorted(root.rglob(PLAN_FILE)):
        by_method = load_plan(path.parent)[1]
        found += [(run.directory, run.experiment) for runs in by_method.values() for run in runs]
    return found


@dataclasses.dataclass(frozen=True)
class Cell:
    """The finished runs of a row and column: seed -> value; and the reasons of the others, by seed."""

    values: Mapping[int, float]
    missing: Mapping[int, str]

    @property
    def interval(self) -> Interval | None:
        """Mean and 95% interval over the seeds; None without a run."""
        return (
            interval([self.values[seed] for seed in sorted(self.values)]) if self.values else None
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      label: what it is called.
      method: the adapter's name.
      trials: all its runs.
      cells: column -> Cell.
    """

    label: str
    method: str
    trials: tuple[Trial, ...]
    cells: Mapping[str, Cell]

    @property
    def frozen(self) -> bool:
        """Whether nothing is trained."""
        return self.method == FROZEN

    @property
    def done(self) -> int:
        """Number of finished runs."""
        return sum(trial.run is not None for trial in self.trials)

    def mean_of(self, name: str) -> float | None:
        """The mean over the finished runs of a number in summary.json."""
        found = [
            t.run.summary[name] for t in self.trials if t.run and name in (t.run.summary or {})
        ]
        return sum(found) / len(found) if found else None

    @property
    def trained(self) -> float | None:
        """Trained parameters."""
        return 0.0 if self.frozen else self.mean_of("trained_parameters")

    @property
    def share(self) -> float | None:
        """Trained parameters, % of the base's."""
        trained, base = self.trained, self.mean_of("base_parameters")
        if not trained:
            return trained
        return 100 * trained / base if base else None


# From a run to column -> value.
Measure = Callable[[Run], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table before it is text: rows, columns, what a value is, and on which split."""

    title: str
    unit: str
    better: str
    split: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def label_of(tasks: Sequence[str]) -> str:
    """Names of tasks or mixtures as a heading."""
    return " + ".join(tasks)


def score_by(kind: str) -> Measure:
    """Scores of a run: of all its tasks ("single"), by language ("multilingual") or by task group ("multitask").

    A score is the task group's primary metric, the mean over its tasks.
    """

    def measure(run: Run) -> Mapping[str, float]:
        if run.evaluation is None:
            return {}
        found = {name: _score(run, tasks) for name, tasks in _cut(kind, run.tasks).items()}
        return {n: v for n, v in found.items() if v is not None and math.isfinite(v)}

    return measure


def loss_by(kind: str) -> Measure:
    """Losses of a run, nats a target token, cut as `score_by` cuts scores."""

    def measure(run: Run) -> Mapping[str, float]:
        losses = (run.evaluation or {"losses": {}})["losses"]
        found = {}
        for name, tasks in _cut(kind, run.tasks).items():
            # The loss of all tasks has a name of its own, and with one task that is the only one.
            whole = [f"{run.split}/loss"] if len(tasks) == len(run.tasks) else []
            values = [losses.get(n) for n in whole or [f"{run.split}/loss/{t}" for t in tasks]]
            found[name] = None if None in values else sum(values) / len(values)
        return {n: v for n, v in found.items() if v is not None and math.isfinite(v)}

    return measure


def _cut(kind: str, tasks: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The parts of a run's tasks, and all of them under MEAN where no part is that already."""
    parts = _parts(kind, tasks)
    whole = any(len(part) == len(tasks) for part in parts.values())
    return parts if whole else {**parts, MEAN: tasks}


def _parts(kind: str, tasks: Sequence[str]) -> Mapping[str, list[str]]:
    if kind == "single":
        return {}
    if kind == "multitask":
        return group_tasks(tasks)
    return {f"{language_name(c)} ({c})": t for c, t in sorted(group_languages(tasks).items())}


def _score(run: Run, tasks: Sequence[str]) -> float | None:
    scores = []
    for members in group_tasks(tasks).values():
        metric = primary_metric([run], members)
        value = group_score(run, metric, members) if metric else None
        scores += [value] * len(members)
    return None if not scores or None in scores else sum(scores) / len(scores)


def make_grid(
    title: str,
    unit: str,
    better: str,
    trials: Sequence[Trial],
    row_of: Callable[[Trial], str],
    column_of: Callable[[Trial, str], str | None],
    measure: Measure,
) -> Grid:
    """Puts trials into rows and columns.

    Args:
      title, unit, better: what the table says of its values; better is "higher" or "lower".
      trials: all of one split.
      row_of: a trial's row.
      column_of: a trial's column for a key of its measure (None leaves the value out).
      measure: from a run to key -> value.

    Raises:
      DataError: two runs of a cell differ in more than the seed, or one is there twice; names the field or directories.
    """
    splits = {trial.experiment.evaluate.split for trial in trials}
    if len(splits) != 1:
        raise DataError(f"the runs were evaluated on different splits: {', '.join(sorted(splits))}")
    by_row: dict[str, list[Trial]] = {}
    for trial in trials:
        by_row.setdefault(row_of(trial), []).append(trial)
    values = {t.directory: measure(t.run) if t.run else None for t in trials}
    # A run without results has the columns that others of its tasks have.
    keys: dict[tuple[str, ...], dict[str, None]] = {}
    for trial in trials:
        known = keys.setdefault(trial.experiment.data.tasks, {})
        known |= dict.fromkeys(values[trial.directory] or {})
    rows, columns = [], {}
    for label, members in by_row.items():
        cells: dict[str, tuple[dict, dict, list]] = {}
        for trial in members:
            for key in keys[trial.experiment.data.tasks] or {MEAN: None}:
                column = column_of(trial, key)
                if column is None:
                    continue
                columns[column] = None
                found, missing, there = cells.setdefault(column, ({}, {}, []))
                _check_same(label, column, trial, there)
                there.append(trial)
                if trial.run is None:
                    missing[trial.seed] = trial.reason
                elif key not in values[trial.directory]:
                    missing[trial.seed] = LACKING
                else:
                    found[trial.seed] = values[trial.directory][key]
        made = {column: Cell(found, missing) for column, (found, missing, _) in cells.items()}
        rows.append(Row(label, members[0].method, tuple(members), made))
    ordered = [c for c in columns if c != MEAN] + [c for c in columns if c == MEAN]
    return Grid(title, unit, better, splits.pop(), tuple(ordered), tuple(rows))


def _check_same(row: str, column: str, trial: Trial, there: Sequence[Trial]) -> None:
    for other in there:
        where = f"{other.directory} and {trial.directory}, both {row} on {column}"
        if other.seed == trial.seed:
            raise DataError(f"{where}, have the same seed {trial.seed}: leave one out of --runs")
        check_alike(other, trial, where)


def check_alike(a: Trial, b: Trial, where: str, apart: Sequence[str] = ()) -> None:
    """Raises DataError, which begins with `where`, if two runs differ in more than the seed and the fields `apart`."""
    of_a, of_b = _fixed_fields(a.experiment), _fixed_fields(b.experiment)
    for name in of_a:
        if name not in apart and of_a[name] != of_b.get(name):
            more = " and ".join([*apart, "the seed"])
            raise DataError(
                f"{where}, differ in more than {more}: {name}={of_a[name]!r} and {of_b.get(name)!r}"
            )


def _fixed_fields(experiment: ExperimentConfig) -> dict[str, Any]:
    """Dotted field -> value of all that the runs of a cell share."""
    return {
        f"{section}.{name}": value
        for section, fields in experiment.to_dict().items()
        for name, value in fields.items()
        if name not in _FREE.get(section, ())
    }


def with_mean(grid: Grid) -> Grid:
    """The grid with a last column, for each seed the mean over all other columns; a seed that lacks one is missing."""
    if len(grid.columns) < 2:
        return grid
    rows = []
    for row in grid.rows:
        cells = [row.cells.get(column, Cell({}, {})) for column in grid.columns]
        seeds = sorted({s for cell in cells for s in (*cell.values, *cell.missing)})
        values = {
            seed: sum(cell.values[seed] for cell in cells) / len(cells)
            for seed in seeds
            if all(seed in cell.values for cell in cells)
        }
        missing = {seed: "a column is missing" for seed in seeds if seed not in values}
        rows.append(dataclasses.replace(row, cells={**row.cells, MEAN: Cell(values, missing)}))
    return dataclasses.replace(grid, columns=(*grid.columns, MEAN), rows=tuple(rows))


def variant_labels(trials: Sequence[Trial]) -> Callable[[Trial], str]:
    """Rows by method; where a method's adapters differ, its rows carry the fields in which they do."""
    adapters: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        fields = trial.experiment.adapter.to_dict() if trial.experiment.adapter else {}
        if fields not in adapters.setdefault(trial.method, []):
            adapters[trial.method].append(fields)

    def label(trial: Trial) -> str:
        name = "base" if trial.method == FROZEN else trial.method
        variants = adapters[trial.method]
        if len(variants) == 1:
            return name
        fields = trial.experiment.adapter.to_dict()
        differing = [f for f in fields if len({json.dumps(v.get(f)) for v in variants}) > 1]
        return f"{name} ({', '.join(f'{f}={show_value(fields[f])}' for f in differing)})"

    return label


def show_value(value: Any) -> str:
    """A field's value as a table shows it."""
    if isinstance(value, list | tuple):
        return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
