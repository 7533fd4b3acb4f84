"""What the runs of a comparison say: means with intervals, ratios to the baseline, and the table of them.

A quantity that is not there is a text, which says why.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.compare_budget import BASELINE
from scripts.compare_runs import SUMMARY_FILE, RunSpec, read_json
from scripts.report_tables import NOT_TRAINED, Cell, Table

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with half the width of its interval, which a single value has not."""

    mean: float
    half: float | None
    values: tuple[float, ...]

    def show(self, digits: int) -> str:
        """As the table prints it."""
        shown = f"{self.mean:.{digits}f}"
        return shown if self.half is None else f"{shown} ± {self.half:.{digits}f}"


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence for Student's T, to about 1e-9 of it.

    Abramowitz and Stegun 26.7.3 and 26.7.4 give that probability for whole degrees of freedom; bisection inverts it.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _t_probability_at(angle, degrees) < confidence:
            low = angle
        else:
            high = angle
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) for Student's T with whole degrees of freedom, t at least 0."""
    return _t_probability_at(math.atan(t / math.sqrt(degrees)), degrees)


def _t_probability_at(angle: float, degrees: int) -> float:
    """P(|T| < t) at angle = atan(t / sqrt(degrees))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (i - 1) / i
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval of the mean, from Student's t."""
    half = None
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = student_t(len(values) - 1) * error
    return Interval(statistics.fmean(values), half, tuple(values))


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a method.

    Attributes:
      method: its name.
      fields: those that the budget set.
      seeds: of the finished runs.
      missing: seed -> why it has no result.
      trained, active, deviation: see `compare_budget.Size`.
      quality: name of a measure of the answers -> Interval, or the reason.
      costs: name of a cost -> number, or the reason.
    """

    method: str
    fields: Mapping[str, Any]
    seeds: tuple[int, ...]
    missing: Mapping[int, str]
    trained: int
    active: int
    deviation: float
    quality: Mapping[str, Interval | str]
    costs: Mapping[str, float | str]

    @property
    def label(self) -> str:
        """The method's name; "frozen" where there is none."""
        return self.method if self.trained else "frozen"


def row_from_json(fields: Mapping[str, Any]) -> Row:
    """The Row that `dataclasses.asdict` and JSON made these fields of."""

    def restore(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return Interval(value["mean"], value["half"], tuple(value["values"]))

    return Row(
        **dict(fields)
        | {
            "seeds": tuple(fields["seeds"]),
            "missing": {int(seed): reason for seed, reason in fields["missing"].items()},
            "quality": {name: restore(value) for name, value in fields["quality"].items()},
        }
    )


@dataclasses.dataclass(frozen=True)
class _Results:
    """The finished runs of a method: seed -> evaluation, and seed -> summary."""

    evaluations: Mapping[int, Mapping[str, Any]]
    summaries: Mapping[int, Mapping[str, Any]]
    missing: Mapping[int, str]


def _read(specs: Sequence[RunSpec]) -> _Results:
    missing = {spec.seed: reason for spec in specs if (reason := spec.failure())}
    done = [spec for spec in specs if spec.seed not in missing]
    return _Results(
        {spec.seed: read_json(spec.evaluation_file) for spec in done},
        {
            spec.seed: summary
            for spec in done
            if (summary := read_json(spec.directory / SUMMARY_FILE)) is not None
        },
        missing,
    )


def make_rows(
    by_method: Mapping[str, Sequence[RunSpec]],
    sizes: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]] | str,
) -> list[Row]:
    """A row a method, in their order.

    Args:
      by_method: the runs.
      sizes: method -> fields, trained, active and deviation.
      costs: what `compare_costs.measure` found, or why there is nothing.
    """
    results = {method: _read(specs) for method, specs in by_method.items()}
    every = [e for found in results.values() for e in found.evaluations.values()]
    metrics = list(dict.fromkeys(name for evaluation in every for name in evaluation["mean"]))
    rows = []
    for method, specs in by_method.items():
        found = results[method]
        split = specs[0].experiment.evaluate.split
        measures: dict[str, Callable[[Mapping], float | None]] = {
            "loss": lambda evaluation, split=split: evaluation["losses"].get(f"{split}/loss"),
            **{
                name: lambda evaluation, name=name: evaluation["mean"].get(name) for name in metrics
            },
        }
        quality = {name: _over_seeds(found, read, name) for name, read in measures.items()}
        rows.append(
            Row(
                method=method,
                seeds=tuple(found.evaluations),
                missing=found.missing,
                quality=quality,
                costs=_costs(method, specs, results, costs),
                **sizes[method],
            )
        )
    return rows


def _over_seeds(
    found: _Results, read: Callable[[Mapping], float | None], name: str
) -> Interval | str:
    if not found.evaluations:
        return "; ".join(dict.fromkeys(found.missing.values()))
    values = [read(evaluation) for evaluation in found.evaluations.values()]
    if any(value is None or not math.isfinite(value) for value in values):
        return f"{name} is not a finite number with every seed"
    return interval(values)


def _costs(
    method: str,
    specs: Sequence[RunSpec],
    results: Mapping[str, _Results],
    costs: Mapping[str, Mapping[str, Any]] | str,
) -> dict[str, float | str]:
    names = ("flops_per_token", "bytes_per_token", "time_ratio", "scratch_ratio", "memory_ratio")
    if specs[0].experiment.adapter is None:
        return dict.fromkeys(names, NOT_TRAINED)
    memory = _memory_ratio(results[method], results.get(BASELINE))
    reason = costs if isinstance(costs, str) else None
    if reason is None and method not in costs:
        reason = "the step's cost was not measured, which follows the first run"
    if reason is not None:
        return dict.fromkeys(names, reason) | {"memory_ratio": memory}
    own = costs[method]
    found: dict[str, float | str] = {
        "flops_per_token": own["flops_per_token"],
        "bytes_per_token": own["bytes_per_token"],
        "memory_ratio": memory,
    }
    baseline = costs.get(BASELINE)
    if baseline is None:
        absent = f"the costs of {BASELINE} were not measured"
        return found | dict.fromkeys(("time_ratio", "scratch_ratio"), absent)
    pairs = zip(own["seconds"], baseline["seconds"], strict=True)
    found["time_ratio"] = statistics.median(mine / other for mine, other in pairs)
    found["scratch_ratio"] = own["scratch_bytes"] / baseline["scratch_bytes"]
    return found


def _memory_ratio(own: _Results, baseline: _Results | None) -> float | str:
    """Mean over the seeds that both have of the ratio of the training processes' peaks."""
    if not own.summaries:
        return "; ".join(dict.fromkeys(own.missing.values())) or f"no {SUMMARY_FILE}"
    shared = [seed for seed in own.summaries if baseline and seed in baseline.summaries]
    if not shared:
        return f"no run of {BASELINE} with the same seed"
    name = "peak_memory_bytes"
    return statistics.fmean(
        own.summaries[seed][name] / baseline.summaries[seed][name] for seed in shared
    )


def to_table(rows: Sequence[Row], split: str) -> Table:
    """The rows as text; what is not there refers to a note."""
    notes: dict[str, list[str]] = {}  # Reason -> the rows that refer to it.

    def cell(row: Row, value: Any, show: Callable[[Any], str]) -> Cell:
        if isinstance(value, str):
            return Cell(f"– {mark(row, value)}")
        return Cell(show(value))

    def mark(row: Row, reason: str) -> str:
        labels = notes.setdefault(reason, [])
        if row.label not in labels:
            labels.append(row.label)
        return f"[{list(notes).index(reason) + 1}]"

    qualities = list(rows[0].quality)
    header = [
        "method",
        "size",
        "seeds",
        "trained parameters",
        f"against {BASELINE}, %",
        "active parameters",
        *(_label(name, split) for name in qualities),
        "MFLOP a token",
        "kB a token",
        f"step time / {BASELINE}",
        f"peak memory / {BASELINE}",
        f"scratch / {BASELINE}",
    ]
    lines = []
    for row in rows:
        seeds = f"{len(row.seeds)} of {len(row.seeds) + len(row.missing)}"
        for seed, reason in row.missing.items():
            seeds += f" {mark(row, f'seed {seed}: {reason}')}"
        fields = ", ".join(f"{name}={_plain(value)}" for name, value in row.fields.items())
        lines.append(
            [
                Cell(row.label),
                Cell(fields or "as configured"),
                Cell(seeds),
                Cell(f"{row.trained:,}"),
                Cell(f"{100 * row.deviation:+.1f}"),
                Cell(f"{row.active:,}"),
                *(
                    cell(row, value, lambda v, name=name: v.show(3 if name == "loss" else 1))
                    for name, value in row.quality.items()
                ),
                cell(row, row.costs["flops_per_token"], lambda v: f"{v / 1e6:,.2f}"),
                cell(row, row.costs["bytes_per_token"], lambda v: f"{v / 1e3:,.0f}"),
                cell(row, row.costs["time_ratio"], lambda v: f"{v:.2f}"),
                cell(row, row.costs["memory_ratio"], lambda v: f"{v:.2f}"),
                cell(row, row.costs["scratch_ratio"], lambda v: f"{v:.2f}"),
            ]
        )
    listed = [
        f"[{number}] {', '.join(labels)}: {reason}."
        for number, (reason, labels) in enumerate(notes.items(), start=1)
    ]
    return Table(header, lines, listed)


def _label(name: str, split: str) -> str:
    return f"{split} loss, nats" if name == "loss" else name.replace("_", " ")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
