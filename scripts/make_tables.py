"""Makes the paper's kinds of tables from run directories alone: Markdown, LaTeX, CSV, JSON and one HTML page with figures.

  python scripts/make_tables.py --kind=single --runs=runs/tables/single --out=runs/tables/single/report
  python scripts/make_tables.py --kind=ablations --runs=runs/tables/ablations --out=... --vary=adapter.rank

Kinds: single (a column a task, a run a cell), multilingual (a column a language), multitask (a column a task group), ablations
(a row a value of a field, for each field in --vary of which there are several). --runs is searched for run directories and for
the sweeps and comparisons that made them; what those promise and is not there is a gap with its reason.
A cell is the mean over seeds ± half its 95% interval (Student's t); below each table stand paired t-tests of --against.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from scripts.cli import run_main
from scripts.report_page import (
    Block,
    Figure,
    Paragraph,
    Section,
    markdown_table,
    to_html,
    to_markdown,
)
from scripts.table_cells import (
    FROZEN,
    MEAN,
    Grid,
    Trial,
    check_alike,
    find_trials,
    label_of,
    loss_by,
    make_grid,
    score_by,
    show_value,
    variant_labels,
    with_mean,
)
from scripts.table_formats import tests_table, to_csv, to_json, to_latex, to_table
from scripts.table_tests import paired_tests
from sira_jax.adapters import METHODS
from sira_jax.errors import ConfigError, DataError, check
from sira_jax.files import write_atomically

KINDS = ("single", "multilingual", "multitask", "ablations")
VARIED = (
    "adapter.num_selected_experts",
    "adapter.capacity_factor",
    "adapter.rank",
    "adapter.num_experts",
    "adapter.router_regularizer",
)
# A field whose value another one follows: the scale alpha / rank is kept.
FOLLOWERS = {"adapter.rank": ("alpha",)}
ORDER = ("none", "lora", "adamix", "molora", "sira")

KIND = flags.DEFINE_enum("kind", "single", KINDS, "The kind of table.")
RUNS = flags.DEFINE_list("runs", [], "Directories that are searched for runs.")
OUT = flags.DEFINE_string("out", None, "Directory of the tables; made if missing.")
METHOD_NAMES = flags.DEFINE_list(
    "methods", [], "Methods to show, none for the base; default: all there are."
)
AGAINST = flags.DEFINE_string("against", "sira", "Method that is tested against each other one.")
VARY = flags.DEFINE_list("vary", list(VARIED), "Fields of the ablations.")
TITLE = flags.DEFINE_string("title", None, "Heading; default: the kind.")


def main(argv: list[str]) -> None:
    """Writes the tables and prints those of the scores."""
    del argv
    if not RUNS.value or not OUT.value:
        raise ConfigError("--runs=DIRECTORY,... and --out=DIRECTORY are needed")
    for name in METHOD_NAMES.value:
        known = (FROZEN, *METHODS)
        check(name in known, "--methods", name, f"some of {', '.join(known)}")
    check(AGAINST.value in METHODS, "--against", AGAINST.value, f"one of {', '.join(METHODS)}")
    trials = _sorted(find_trials(RUNS.value), METHOD_NAMES.value)
    title = TITLE.value or f"Results: {KIND.value}"
    path = write_tables(trials, KIND.value, Path(OUT.value), title, AGAINST.value, VARY.value)
    print(f"\ntables: {path}.{{md,tex,csv,json,html}}")


def _sorted(trials: Sequence[Trial], methods: Sequence[str]) -> list[Trial]:
    """Those of `methods`, in that order, else in the paper's and the rest by name; by seed within a method."""
    chosen = [t for t in trials if not methods or t.method in methods]
    if not chosen:
        found = ", ".join(sorted({trial.method for trial in trials}))
        raise DataError(f"--methods={','.join(methods)}: no run has one of them; there are {found}")
    order = list(methods) or [*ORDER, *sorted(METHODS)]
    return sorted(chosen, key=lambda trial: (order.index(trial.method), trial.seed))


def write_tables(
    trials: Sequence[Trial],
    kind: str,
    out: Path,
    title: str,
    against: str,
    vary: Sequence[str] = VARIED,
) -> Path:
    """Writes KIND.md, KIND.tex, KIND.csv, KIND.json, KIND.html and the figures, and prints the tables of scores.

    Args:
      trials: in the order of the rows.
      kind: one of KINDS.
      out: directory, made if missing.
      title: heading.
      against: method whose rows are tested against the others'.
      vary: dotted fields, for ablations.

    Returns:
      Path of the files without their suffix.

    Raises:
      DataError: the runs do not make such a table, naming what differs.
    """
    made = _ablations(trials, vary) if kind == "ablations" else _tables(trials, kind)
    sections, latex, pngs = [], [], {}
    for name, grids, figures in made:
        blocks: list[Block] = []
        for grid in grids:
            table = to_table(grid)
            blocks += [
                Paragraph(
                    f"{grid.title}: {grid.unit}, {grid.split} split; {grid.better} is better."
                ),
                table,
            ]
            latex.append(to_latex(table, f"{grid.title}: {grid.unit}, {grid.split} split."))
            if grid is grids[0]:
                print(f"\n{grid.title}: {grid.unit}\n\n{markdown_table(table)}")
            for row in grid.rows:
                tests = paired_tests(grid, row) if row.method == against else []
                if tests and kind != "ablations":
                    blocks += [Paragraph(_TEST_TEXT), tests_table(tests, grid)]
        for file, (png, caption) in figures.items():
            if png is not None:
                pngs[file] = png
                blocks.append(Figure(file, caption))
        sections.append(Section(name, blocks))
    grids = [grid for _, found, _ in made for grid in found]
    files = {
        f"{kind}.md": to_markdown(title, sections).encode(),
        f"{kind}.html": to_html(title, sections, pngs).encode(),
        f"{kind}.tex": "\n".join(latex).encode(),
        f"{kind}.csv": to_csv(grids).encode(),
        f"{kind}.json": to_json(grids).encode(),
        **pngs,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_atomically(out / file, lambda opened, content=content: opened.write(content))
    except OSError as error:
        raise DataError(f"{out}: the tables cannot be written: {error}") from error
    return out / kind


_TEST_TEXT = (
    "Mean difference over the seeds that both have ± half its 95% interval; n pairs; p of the paired t-test, two-sided, after"
    " Holm's correction for all tests of this table."
)
# Name of a section, its grids, and file -> (picture or None, caption).
_Made = tuple[str, list[Grid], dict[str, tuple[bytes | None, str]]]


def _tables(trials: Sequence[Trial], kind: str) -> list[_Made]:
    """One section for all tasks (single), or one for each mixture."""
    # Only the pictures need matplotlib.
    from scripts import table_figures

    row_of = variant_labels(trials)
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        name = "Single tasks" if kind == "single" else label_of(trial.experiment.data.tasks)
        groups.setdefault(name, []).append(trial)
    made = []
    for place, (name, members) in enumerate(groups.items()):

        def column_of(trial: Trial, key: str) -> str | None:
            if kind != "single":
                return key
            return label_of(trial.experiment.data.tasks) if key == MEAN else None

        grids = []
        for unit, better, measure in (
            ("score, 0 to 100", "higher", score_by(kind)),
            ("loss, nats a target token", "lower", loss_by(kind)),
        ):
            grid = make_grid(name, unit, better, members, row_of, column_of, measure)
            grids.append(with_mean(grid) if kind == "single" else grid)
        prefix = kind if len(groups) == 1 else f"{kind}_{place}"
        figures = {
            f"{prefix}_parameters.png": (
                table_figures.against_parameters(grids[0]),
                "Mean and 95% interval against the trained parameters; the dashed line is the base model.",
            ),
            f"{prefix}_curves.png": (
                table_figures.curves(grids[0]),
                "Mean over the seeds; the band is from the lowest to the highest.",
            ),
        }
        made.append((name, grids, figures))
    return made


def _ablations(trials: Sequence[Trial], vary: Sequence[str]) -> list[_Made]:
    """A section for each field with several values in runs that are otherwise the same method on the same tasks."""
    from scripts import table_figures

    made: list[_Made] = []
    known = {*VARIED, *(field for trial in trials for field in _fields(trial))}
    for field in vary:
        check(field in known, "--vary", field, f"some of {', '.join(sorted(known))}")
        series: dict[tuple, list[Trial]] = {}
        for trial in trials:
            if trial.method != FROZEN and (key := _without(trial, field)) is not None:
                series.setdefault(key, []).append(trial)
        for place, members in enumerate(series.values()):
            ordered = sorted(members, key=lambda trial: _sort_key(_value(trial, field)))
            values = {_row_label(trial, field): _value(trial, field) for trial in ordered}
            if len(values) < 2:
                continue
            apart = (field, *(f"adapter.{name}" for name in FOLLOWERS.get(field, ())))
            for trial in ordered[1:]:
                where = f"{ordered[0].directory} and {trial.directory}, both {trial.method}"
                check_alike(ordered[0], trial, where, apart)
            tasks = members[0].experiment.data.tasks
            base = [t for t in trials if t.method == FROZEN and t.experiment.data.tasks == tasks]
            name = f"{members[0].method}: {field.rpartition('.')[2]} on {label_of(tasks)}"
            grids = [
                make_grid(
                    name,
                    unit,
                    better,
                    [*base, *ordered],
                    lambda trial, field=field: _row_label(trial, field),
                    lambda trial, key: key,
                    measure,
                )
                for unit, better, measure in (
                    ("score, 0 to 100", "higher", score_by("multitask")),
                    ("loss, nats a target token", "lower", loss_by("single")),
                )
            ]
            hashable = {
                label: show_value(v) if isinstance(v, list) else v for label, v in values.items()
            }
            caption = "Mean and 95% interval over the seeds; the dashed line is the base model."
            figures = {}
            for what, grid in zip(("score", "loss"), grids, strict=True):
                file = f"ablation_{field.rpartition('.')[2]}_{place}_{what}.png"
                lines = {members[0].method: grid}
                figures[file] = (table_figures.ablation(lines, field, hashable), caption)
            made.append((name, grids, figures))
    if not made:
        raise DataError(
            f"--vary={','.join(vary)}: no method has runs with two values of one of these fields and the rest alike"
        )
    return made


def _fields(trial: Trial) -> dict[str, Any]:
    fields = trial.experiment.to_dict()
    return {
        f"{section}.{name}": value for section, own in fields.items() for name, value in own.items()
    }


def _value(trial: Trial, field: str) -> Any:
    return _fields(trial)[field]


def _without(trial: Trial, field: str) -> tuple | None:
    """What the runs of a series share: method, tasks and the adapter but for the field and those that follow it."""
    if field not in _fields(trial):
        return None
    adapter = trial.experiment.adapter.to_dict()
    for name in (field.rpartition(".")[2], *FOLLOWERS.get(field, ())):
        if field.startswith("adapter."):
            adapter.pop(name, None)
    return trial.method, trial.experiment.data.tasks, json.dumps(adapter, sort_keys=True)


def _row_label(trial: Trial, field: str) -> str:
    if trial.method == FROZEN:
        return "base"
    return f"{field.rpartition('.')[2]} = {show_value(_value(trial, field))}"


def _sort_key(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, show_value(value))


if __name__ == "__main__":
    run_main(main)
