"""The report's tables, and what they say about SiRA against LoRA in words."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts.run_results import (
    SUMMARY_FILE,
    Router,
    Run,
    all_tasks,
    group_score,
    group_tasks,
    is_right,
    metrics_of,
    primary_metric,
)

_METRIC_LABELS = {
    "exact_match": "exact match",
    "chrf": "chrF",
    "ast_match": "AST match",
    "sequence_accuracy": "sequence accuracy",
    "f1": "F1",
    "em": "EM",
    "boolean_accuracy": "has answer",
    "span_f1": "span F1",
    "number_match": "number match",
    "execution_accuracy": "execution accuracy",
    "program_accuracy": "program accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
_SHARES = ("exact_match", "ast_match", "sequence_accuracy", "number_match", "boolean_accuracy")
NOT_TRAINED = "nothing was trained"


@dataclass(frozen=True)
class Quantity:
    """A row of a table of runs.

    Attributes:
      label: what it is, with its unit.
      value: from a run to the number, or to the reason why there is none.
      digits: digits after the point.
      better: "higher", "lower", or "" where neither is.
      quality: whether it measures the model's answers (and not their cost).
    """

    label: str
    value: Callable[[Run], float | str]
    digits: int = 0
    better: str = ""
    quality: bool = False

    def show(self, value: float) -> str:
        """The number as the table prints it."""
        return f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether it is the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Header, rows, and the numbered notes that the cells refer to."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default=())


def main_quantities(runs: Sequence[Run]) -> list[Quantity]:
    """The rows of the main table: size, loss, mean scores, score of each task group, cost."""
    tasks = all_tasks(runs)
    means = dict.fromkeys(name for run in runs if run.evaluation for name in run.evaluation["mean"])
    return [
        Quantity("trained parameters", _trained_parameters),
        Quantity("share of the base's parameters, %", _trained_share, 3),
        Quantity("training steps", _from_summary("steps")),
        Quantity("training tokens", _from_summary("tokens")),
        _loss(f"{runs[0].split} loss, nats per target token"),
        *(_mean_score(metric) for metric in sorted(means, key=_metric_order)),
        *group_quantities(runs, group_tasks(tasks), only_primary=True),
        Quantity("seconds per step (median)", _from_summary("seconds_per_step"), 2, better="lower"),
        Quantity(
            "peak memory, GiB", _from_summary("peak_memory_bytes", 1 / 2**30), 2, better="lower"
        ),
    ]


def group_quantities(
    runs: Sequence[Run], groups: Mapping[str, Sequence[str]], *, only_primary: bool
) -> list[Quantity]:
    """For each group of tasks the mean of its primary metric, or of its loss and every metric."""
    quantities = []
    for group, tasks in groups.items():
        name = group if len(tasks) == 1 else f"{group} ({len(tasks)} tasks)"
        metrics = [primary_metric(runs, tasks)]
        if not only_primary:
            metrics = sorted(metrics_of(runs, tasks), key=_metric_order)
            quantities.append(_loss(f"{name}: loss", tasks))
        quantities.extend(_group_metric(name, metric, tasks) for metric in metrics if metric)
    return quantities


def _metric_order(metric: str) -> tuple[int, str]:
    names = list(_METRIC_LABELS)
    return (names.index(metric) if metric in names else len(names), metric)


def _metric_label(metric: str) -> str:
    unit = ", %" if metric in _SHARES else ""
    return _METRIC_LABELS.get(metric, metric) + unit


def _trained_parameters(run: Run) -> float | str:
    return 0.0 if run.frozen else _from_summary("trained_parameters")(run)


def _trained_share(run: Run) -> float | str:
    trained, base = _trained_parameters(run), _from_summary("base_parameters")(run)
    if trained == 0:
        return 0.0
    if isinstance(trained, str) or isinstance(base, str):
        return trained if isinstance(trained, str) else base
    return 100 * trained / base if base > 0 else f"base_parameters is {base}"


def _from_summary(name: str, factor: float = 1.0) -> Callable[[Run], float | str]:
    def value(run: Run) -> float | str:
        if run.summary is not None and name in run.summary:
            return run.summary[name] * factor
        if run.frozen:
            return NOT_TRAINED
        return f"no {SUMMARY_FILE}" if run.summary is None else f"{SUMMARY_FILE} has no {name}"

    return value


def _evaluated(run: Run, value: float | None, what: str) -> float | str:
    file = f"evaluation_{run.split}.json"
    if run.evaluation is None:
        return f"no {file}"
    return f"{file} has no {what}" if value is None else value


def _loss(label: str, tasks: Sequence[str] = ()) -> Quantity:
    def value(run: Run) -> float | str:
        names = [f"{run.split}/loss/{task}" for task in tasks]
        if not tasks or run.tasks == list(tasks[:1]):
            # With a single task the overall loss is the task's, and is the only one written.
            names = [f"{run.split}/loss"]
        losses = run.evaluation["losses"] if run.evaluation else {}
        found = [losses[name] for name in names if name in losses]
        mean = sum(found) / len(found) if found else None
        return _evaluated(run, mean, " or ".join(names))

    return Quantity(label, value, 3, better="lower", quality=True)


def _mean_score(metric: str) -> Quantity:
    def value(run: Run) -> float | str:
        mean = (run.evaluation or {"mean": {}})["mean"].get(metric)
        return _evaluated(run, mean, f"mean {metric}")

    return Quantity(
        f"mean over tasks: {_metric_label(metric)}", value, 1, better="higher", quality=True
    )


def _group_metric(name: str, metric: str, tasks: Sequence[str]) -> Quantity:
    def value(run: Run) -> float | str:
        return _evaluated(run, group_score(run, metric, tasks), f"{metric} of {', '.join(tasks)}")

    return Quantity(f"{name}: {_metric_label(metric)}", value, 1, better="higher", quality=True)


def table_of(runs: Sequence[Run], quantities: Sequence[Quantity]) -> Table:
    """A column a run, the best of a row marked; a cell without a number refers to a note."""
    notes: dict[str, int] = {}
    rows = []
    for quantity in quantities:
        values = [quantity.value(run) for run in runs]
        shown = []
        for run, value in zip(runs, values, strict=True):
            if isinstance(value, str) or not math.isfinite(value):
                reason = value if isinstance(value, str) else f"{quantity.label} is {value}"
                number = notes.setdefault(f"{run.name}: {reason}", len(notes) + 1)
                shown.append(f"– [{number}]")
            else:
                shown.append(quantity.show(value))
        numbers = [v for v in values if not isinstance(v, str) and math.isfinite(v)]
        best = None
        if quantity.better and len({quantity.show(v) for v in numbers}) > 1:
            best = quantity.show(max(numbers) if quantity.better == "higher" else min(numbers))
        rows.append([Cell(quantity.label), *(Cell(text, text == best) for text in shown)])
    listed = [f"[{number}] {text}." for text, number in notes.items()]
    return Table(["", *(run.name for run in runs)], rows, listed)


def router_table(router: Router) -> Table:
    """One row a projection: how sharp its routers decide and how even the load is."""
    rows = []
    for projection in router.projections:
        statistics = projection.statistics
        load_LE = projection.relative_load_LE
        experts = load_LE.shape[-1]
        rows.append(
            [
                projection.name,
                f"{statistics['gate_entropy'].mean():.3f} of {math.log(experts):.3f}",
                f"{statistics['router_confidence'].mean():.3f}",
                f"{100 * statistics['dropped_share'].mean():.2f}",
                f"{load_LE.max():.2f}",
                f"{100 * np.mean(load_LE < 0.1):.1f}",
            ]
        )
    header = [
        "projection",
        "gate entropy, nats (of ln E)",
        "router confidence",
        "dropped pairs, %",
        "highest load of an expert (1 = even)",
        "experts under a tenth of an even load, %",
    ]
    return Table(header, [[Cell(text) for text in row] for row in rows])


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes the columns hard to compare."""
    evaluated = [run for run in runs if run.evaluation]
    if len({tuple(sorted(run.evaluation["examples"].items())) for run in evaluated}) < 2:
        return []
    sizes = [
        f"{run.name} {sum(run.evaluation['examples'].values()):,} examples of"
        f" {len(run.evaluation['examples'])} tasks"
        for run in evaluated
    ]
    return [
        f"The runs were evaluated on different examples: {'; '.join(sizes)}. Compare with care."
    ]


def verdict(runs: Sequence[Run]) -> list[str]:
    """Sentences on each SiRA run against each LoRA run, from the numbers of the main table."""
    sentences = []
    quantities = [q for q in main_quantities(runs) if q.quality]
    for sira in (run for run in runs if run.method == "sira"):
        for lora in (run for run in runs if run.method == "lora"):
            sentences.append(_compare(sira, lora, quantities))
            sentences.extend(_costs(sira, lora))
            sentences.extend(_sign_test(sira, lora))
    return sentences


def _compare(sira: Run, lora: Run, quantities: Sequence[Quantity]) -> str:
    ahead, behind = [], []
    for quantity in quantities:
        a, b = quantity.value(sira), quantity.value(lora)
        if isinstance(a, str) or isinstance(b, str):
            continue
        text = f"{quantity.label} {quantity.show(a)} against {quantity.show(b)}"
        gain = a - b if quantity.better == "higher" else b - a
        beats = gain > 0 and quantity.show(a) != quantity.show(b)
        (ahead if beats else behind).append(text)
    count = len(ahead) + len(behind)
    if not count:
        return f"{sira.name} and {lora.name} have no measure in common."
    if not behind:
        return f"{sira.name} beats {lora.name} on each of the {count} measures of the answers."
    text = f"{sira.name} does not beat {lora.name} on {len(behind)} of the {count} measures of the"
    text += f" answers ({'; '.join(behind)})"
    return text + (f"; it is ahead on the rest ({len(ahead)})." if ahead else ".")


def _costs(sira: Run, lora: Run) -> list[str]:
    parts = []
    for name, text in (
        ("trained_parameters", "trained parameters"),
        ("seconds_per_step", "time of a step"),
        ("peak_memory_bytes", "peak memory"),
    ):
        a, b = _from_summary(name)(sira), _from_summary(name)(lora)
        if not isinstance(a, str) and not isinstance(b, str) and b > 0:
            parts.append(f"{a / b:.2f} times the {text}")
    return [f"{sira.name} has {', '.join(parts)} of {lora.name}."] if parts else []


def _sign_test(sira: Run, lora: Run) -> list[str]:
    """Exact two-sided sign test over the examples that both runs answered."""
    if not sira.predictions or not lora.predictions:
        return []
    shared = [key for key in sira.predictions if key in lora.predictions]
    pairs = [
        (is_right(sira.predictions[key], key[2]), is_right(lora.predictions[key], key[2]))
        for key in shared
    ]
    only_sira, only_lora = pairs.count((True, False)), pairs.count((False, True))
    differing = only_sira + only_lora
    if not differing:
        return [
            f"On {len(shared):,} shared examples {sira.name} and {lora.name} match the target"
            " exactly in the same cases."
        ]
    p = sign_test(only_sira, only_lora)
    meaning = "hardly explains" if p < 0.05 else "could explain"
    return [
        f"On {len(shared):,} shared examples {sira.name} alone matches the target exactly on"
        f" {only_sira:,}, {lora.name} alone on {only_lora:,}: a difference that chance {meaning}"
        f" (sign test, p = {p:.2g})."
    ]


def sign_test(a: int, b: int) -> float:
    """Chance of a split at least as uneven as a to b if both sides were equally likely."""
    n = a + b
    tail = sum(math.comb(n, i) for i in range(min(a, b) + 1))
    return min(1.0, 2 * tail / 2**n)
