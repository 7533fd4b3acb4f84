"""Grids as text: the table of cells, its LaTeX (booktabs), CSV and JSON."""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from scripts.compare_table import Interval
from scripts.report_tables import Cell, Table
from scripts.table_cells import LACKING, Grid, Row
from scripts.table_cells import Cell as Values
from scripts.table_tests import Test

_DIGITS = {"higher": 1, "lower": 3}
ABSENT = "no run of it"
_SMALLEST_P = 1e-12  # Under it, p is one less a number that is rounded to one.


def show(value: Interval, better: str) -> str:
    """Mean ± half the interval, with the digits that a score or a loss has."""
    return value.show(_DIGITS[better])


def to_table(grid: Grid) -> Table:
    """Rows with their size, number of runs and a cell a column; the best mean of a column is marked, gaps refer to notes."""
    notes: dict[str, list[str]] = {}

    def refer(row: Row, reason: str) -> str:
        rows = notes.setdefault(reason, [])
        if row.label not in rows:
            rows.append(row.label)
        return f"[{list(notes).index(reason) + 1}]"

    best = {column: _best(grid, column) for column in grid.columns}
    lines = []
    for row in grid.rows:
        runs = f"{row.done} of {len(row.trials)}"
        for trial in row.trials:
            if trial.run is None:
                seed = "" if row.frozen else f"seed {trial.seed}: "
                where = " + ".join(trial.experiment.data.tasks)
                runs += f" {refer(row, f'{where}, {seed}{trial.reason}')}"
        share = (
            f"{row.share:.3f}" if row.share is not None else f"– {refer(row, 'no finished run')}"
        )
        line = [Cell(row.label), Cell(share), Cell(runs)]
        for column in grid.columns:
            line.append(_cell(row, row.cells.get(column), grid, best[column], refer))
        lines.append(line)
    listed = [
        f"[{number}] {', '.join(rows)}: {reason}."
        for number, (reason, rows) in enumerate(notes.items(), start=1)
    ]
    return Table(["method", "trained, %", "runs", *grid.columns], lines, listed)


def _cell(row: Row, values: Values | None, grid: Grid, best: str | None, refer) -> Cell:
    if values is None:
        return Cell(f"– {refer(row, ABSENT)}")
    found = values.interval
    if found is None:
        reasons = dict.fromkeys(values.missing.values())
        return Cell(f"– {refer(row, '; '.join(reasons) or ABSENT)}")
    text = show(found, grid.better)
    lacking = [reason for reason in values.missing.values() if reason == LACKING]
    mean = f"{found.mean:.{_DIGITS[grid.better]}f}"
    if lacking:
        text += f" {refer(row, lacking[0])}"
    return Cell(text, mean == best)


def _best(grid: Grid, column: str) -> str | None:
    """The best mean of a column as it is shown; None where all are alike."""
    found = [row.cells[column].interval for row in grid.rows if column in row.cells]
    means = [value.mean for value in found if value is not None]
    digits = _DIGITS[grid.better]
    if len({f"{mean:.{digits}f}" for mean in means}) < 2:
        return None
    return f"{max(means) if grid.better == 'higher' else min(means):.{digits}f}"


def tests_table(tests: Sequence[Test], grid: Grid) -> Table:
    """A row for each opponent, a cell a column: the difference, its interval, number of pairs and Holm's p."""
    others = list(dict.fromkeys(test.other for test in tests))
    rows = []
    for other in others:
        line = [Cell(f"{tests[0].row} – {other}")]
        for column in grid.columns:
            (test,) = [t for t in tests if (t.other, t.column) == (other, column)]
            line.append(Cell(_show_test(test, grid.better)))
        rows.append(line)
    return Table(["difference", *grid.columns], rows)


def _show_test(test: Test, better: str) -> str:
    if test.difference is None:
        return "– no common seed"
    digits = _DIGITS[better]
    text = f"{test.difference.mean:+.{digits}f}"
    if test.difference.half is not None:
        text += f" ± {test.difference.half:.{digits}f}"
    pairs = len(test.difference.values)
    if test.adjusted is None:
        return f"{text} (n={pairs})"
    small = test.adjusted < _SMALLEST_P
    p = f"p<{_SMALLEST_P:g}" if small else f"p={test.adjusted:.2g}"
    return f"{text} (n={pairs}, {p})"


def to_latex(table: Table, caption: str) -> str:
    """A booktabs table; numbers are set in math, the best in bold, notes below."""
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex, table.header)) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = [rf"\textbf{{{latex(c.text)}}}" if c.best else latex(c.text) for c in row]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        notes = r" \\ ".join(map(latex, table.notes))
        lines.append(rf"\par\smallskip\footnotesize {notes}")
    return "\n".join([*lines, r"\end{table}", ""])


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "\n": " ",
}


def latex(text: str) -> str:
    """Text as LaTeX sets it; a leading bracket, which would be an argument of the line before, is protected."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    escaped = re.sub(r"(?<![\w.])-(?=\d)", r"$-$", escaped)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


_RECORD = (
    "table",
    "unit",
    "row",
    "method",
    "trained_share_percent",
    "column",
    "mean",
    "half_95",
    "runs",
    "values_by_seed",
    "missing",
)


def to_records(grids: Sequence[Grid]) -> list[dict[str, Any]]:
    """A record a cell: where it stands, mean, half of the interval, each seed's value, and reasons of gaps by seed.

    What is not there is None; a reason that is no seed's has the seed -1.
    """
    records = []
    for grid in grids:
        for row in grid.rows:
            for column in grid.columns:
                cell = row.cells.get(column, Values({}, {-1: ABSENT}))
                found = cell.interval
                values = (
                    grid.title,
                    grid.unit,
                    row.label,
                    row.method,
                    row.share,
                    column,
                    None if found is None else found.mean,
                    None if found is None else found.half,
                    len(cell.values),
                    dict(sorted(cell.values.items())),
                    dict(sorted(cell.missing.items())),
                )
                records.append(dict(zip(_RECORD, values, strict=True)))
    return records


def to_json(grids: Sequence[Grid]) -> str:
    """The records of `to_records`, one a line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in to_records(grids))
    return f"[\n{lines}\n]\n"


def to_csv(grids: Sequence[Grid]) -> str:
    """The records of `to_records`, a line each."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_RECORD)
    for record in to_records(grids):
        values = " ".join(f"{seed}:{value!r}" for seed, value in record["values_by_seed"].items())
        missing = "; ".join(
            reason if seed < 0 else f"seed {seed}: {reason}"
            for seed, reason in record["missing"].items()
        )
        record |= {"values_by_seed": values, "missing": missing}
        writer.writerow(["" if value is None else value for value in record.values()])
    return buffer.getvalue()
