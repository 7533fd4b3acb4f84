"""The pictures of tables: learning curves over seeds, and a measure against an ablated field with intervals."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from scripts import compare_figure, compare_table
from scripts.figures import FROZEN_COLOR, PALETTE, STYLE, panels, to_png
from scripts.table_cells import Grid, Row, show_value

_MARKERS = "osD^vPX"
_LINES = ("-", "--", ":", "-.")
_MAX_PANELS = 12


def curves(grid: Grid) -> bytes | None:
    """Loss against steps: the mean over a row's seeds and the range between them, a panel a set of tasks; None without any.

    Validation loss where it was measured during training, else the training's.
    """
    by_tasks: dict[str, dict[str, list[tuple[list[int], list[float]]]]] = {}
    validated = any(
        len(t.run.curve("validation/loss")[0]) > 1 for r in grid.rows for t in r.trials if t.run
    )
    name = "validation/loss" if validated else "train/loss"
    for row in grid.rows:
        for trial in row.trials:
            points = trial.run.curve(name) if trial.run else ([], [])
            if points[0]:
                panel = " + ".join(trial.experiment.data.tasks)
                by_tasks.setdefault(panel, {}).setdefault(row.label, []).append(points)
    shown = list(by_tasks.items())[:_MAX_PANELS]
    if not shown:
        return None
    looks = _looks([row for row in grid.rows if not row.frozen])
    with matplotlib.rc_context(STYLE):
        names = {label for _, by_row in shown for label in by_row}
        across = min(5, 2 * len(shown))
        figure, places = panels(len(shown), 4.6, 3.4)
        # The legend below has lines of its own.
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.3 + 0.22 * -(-len(names) // across))
        for axes, (title, by_row) in zip(places, shown, strict=True):
            for label, runs in by_row.items():
                _band(axes, runs, *looks[label], label)
            axes.set(title=title, xlabel="optimizer step")
            axes.set_ylabel(f"{name.replace('/', ' ')} (nats a target token)")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        handles = {line.get_label(): line for axes in places for line in axes.lines}
        figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=across)
        return to_png(figure)


def _band(
    axes: Axes,
    runs: Sequence[tuple[list[int], list[float]]],
    color: str,
    linestyle: str,
    label: str,
) -> None:
    """The mean at the steps that all runs have."""
    by_run = [dict(zip(*points, strict=True)) for points in runs]
    steps = sorted(set.intersection(*map(set, by_run)))
    values = [[points[step] for points in by_run] for step in steps]
    means = [sum(v) / len(v) for v in values]
    axes.plot(steps, means, color=color, linestyle=linestyle, label=label)
    if len(by_run) > 1:
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15
        )


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Color and line of each row: where the colors begin again, the line is another."""
    count = len(PALETTE)
    return {
        row.label: (PALETTE[i % count], _LINES[i // count % len(_LINES)])
        for i, row in enumerate(rows)
    }


def against_parameters(grid: Grid) -> bytes | None:
    """Each column of the grid against the trained parameters, by scripts/compare_figure.py."""
    rows = []
    for row in grid.rows:
        if row.trained is None:
            continue
        cells = {column: row.cells.get(column) for column in grid.columns}
        quality = {
            f"{column}: {grid.unit}": (cell and cell.interval) or "no finished run"
            for column, cell in list(cells.items())[-_MAX_PANELS:]
        }
        trained = round(row.trained)
        rows.append(
            compare_table.Row(
                method=row.label,
                fields={},
                seeds=(),
                missing={},
                trained=trained,
                active=trained,
                deviation=0.0,
                quality=quality,
                costs={},
            )
        )
    return compare_figure.draw(rows, grid.split) if rows else None


def ablation(grids: Mapping[str, Grid], field: str, values: Mapping[str, object]) -> bytes | None:
    """Means with 95% intervals against a field: a line a series of the grid's, with the base model as a dashed line.

    Args:
      grids: name of a line -> its grid, whose rows are the field's values.
      field: its name.
      values: label of a row -> the field's value. Numbers are placed on an axis (a logarithmic one where they double), others
        side by side.
    """
    with matplotlib.rc_context(STYLE):
        first = next(iter(grids.values()))
        columns = [c for g in grids.values() for c in g.columns]
        columns = list(dict.fromkeys(columns))[-_MAX_PANELS:]
        ordered = list(dict.fromkeys(values.values()))
        numbers = [v for v in ordered if isinstance(v, int | float) and not isinstance(v, bool)]
        numeric = len(numbers) == len(ordered)
        # None is a number's end, such as of a capacity: it has a place, though none on a scale.
        connected = bool(numbers) and all(v is None or v in numbers for v in ordered)
        if numeric:
            ordered = sorted(ordered)
        figure, places = panels(len(columns), 4.4, 3.9)
        drawn = False
        for axes, column in zip(places, columns, strict=True):
            for place, (name, grid) in enumerate(grids.items()):
                shape = (ordered, numeric, "-" if connected else "none")
                drawn |= _line(axes, grid, column, values, *shape, place, name)
            axes.set(title=column, xlabel=field.rpartition(".")[2].replace("_", " "))
            axes.set_ylabel(f"{first.split} {first.unit}")
            if not numeric:
                axes.set_xticks(
                    range(len(ordered)),
                    [show_value(v).replace(" + ", "\n+ ") for v in ordered],
                    fontsize=7.5,
                )
            elif min(ordered) > 0 and max(ordered) / min(ordered) >= 4:
                axes.set_xscale("log", base=2)
                axes.set_xticks(ordered, [show_value(v) for v in ordered])
        handles = {line.get_label(): line for axes in figure.axes for line in axes.containers}
        if len(handles) > 1:
            figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=4)
        return to_png(figure) if drawn else None


def _line(
    axes: Axes,
    grid: Grid,
    column: str,
    values: Mapping[str, object],
    ordered: Sequence[object],
    numeric: bool,
    linestyle: str,
    place: int,
    name: str,
) -> bool:
    points = []
    for row in grid.rows:
        cell = row.cells.get(column)
        found = cell.interval if cell else None
        if found is None:
            continue
        if row.frozen:
            axes.axhline(found.mean, color=FROZEN_COLOR, linestyle="--", linewidth=1)
        elif row.label in values:
            value = values[row.label]
            at = value if numeric else ordered.index(value)
            points.append((at, found.mean, found.half or 0.0))
    if not points or not any(math.isfinite(p[1]) for p in points):
        return False
    x, y, half = zip(*sorted(points), strict=True)
    axes.errorbar(
        x,
        y,
        yerr=half,
        color=PALETTE[place % len(PALETTE)],
        marker=_MARKERS[place % len(_MARKERS)],
        linestyle=linestyle,
        capsize=3,
        label=name,
    )
    return True
