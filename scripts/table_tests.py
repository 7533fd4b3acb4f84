"""Paired tests between the rows of a grid: the same seed is the same data in the same order, so that seeds pair the runs."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scripts.compare_table import Interval, interval, t_probability
from scripts.table_cells import Cell, Grid, Row


@dataclasses.dataclass(frozen=True)
class Test:
    """One row against another in one column.

    Attributes:
      row, other, column: what is compared.
      difference: row minus other over the seeds that both have, with its 95% interval; None without a common seed.
      p: chance of a mean difference at least as large if there were none (paired t-test, two-sided); None with under two
        seeds, or where all differences are equal.
      adjusted: p after Holm's correction for all tests made together.
    """

    row: str
    other: str
    column: str
    difference: Interval | None
    p: float | None
    adjusted: float | None = None


def paired_tests(grid: Grid, row: Row) -> list[Test]:
    """`row` against each other row in each column. The frozen model, which no seed changes, pairs with every seed."""
    tests = []
    for other in grid.rows:
        if other.label == row.label:
            continue
        for column in grid.columns:
            empty = Cell({}, {})
            mine, theirs = row.cells.get(column, empty), other.cells.get(column, empty)
            tests.append(_test(row, other, column, mine, theirs))
    adjusted = holm([test.p for test in tests])
    return [dataclasses.replace(t, adjusted=p) for t, p in zip(tests, adjusted, strict=True)]


def _test(row: Row, other: Row, column: str, mine: Cell, theirs: Cell) -> Test:
    def pairs(cell: Cell, frozen: bool, seeds: Sequence[int]) -> dict[int, float]:
        if frozen and len(cell.values) == 1:
            return dict.fromkeys(seeds, next(iter(cell.values.values())))
        return dict(cell.values)

    a, b = (
        pairs(mine, row.frozen, sorted(theirs.values)),
        pairs(theirs, other.frozen, sorted(mine.values)),
    )
    differences = [a[seed] - b[seed] for seed in sorted(a) if seed in b]
    if not differences:
        return Test(row.label, other.label, column, None, None)
    return Test(row.label, other.label, column, interval(differences), p_value(differences))


def p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test; None for under two differences, or where they are all equal."""
    if len(differences) < 2 or max(differences) == min(differences):
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    t = abs(statistics.fmean(differences)) / error
    return max(0.0, 1 - t_probability(t, len(differences) - 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979) of those that are numbers."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for place, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p))
        adjusted[i] = largest
    return adjusted
