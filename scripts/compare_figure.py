"""The picture of a comparison: each measure of the answers against the trained parameters."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from scripts.compare_table import Interval, Row
from scripts.figures import FROZEN_COLOR, PALETTE, STYLE, panels, to_png

_MARKERS = "os^Dv"
_LABEL_SIZE = 7.5
# Height of a label, as a share of the axes' height.
_LABEL_HEIGHT = 0.042


def draw(rows: Sequence[Row], split: str) -> bytes:
    """A PNG with a panel a measure: mean and 95% interval of each method, trained parameters on a logarithmic axis.

    A method without the measure is left out of its panel; the frozen model is a horizontal line. A measure that is the same
    for all tells nothing and has no panel. Three panels lie side by side.
    """
    with matplotlib.rc_context(STYLE):
        names = [name for name in rows[0].quality if _differs(rows, name)] or list(rows[0].quality)
        figure, places = panels(len(names), 5.6, 4.6)
        for axes, name in zip(places, names, strict=True):
            _panel(axes, rows, name)
            title = f"{split} loss (nats a target token)" if name == "loss" else name
            axes.set(title=title.replace("_", " "), xlabel="trained parameters")
        return to_png(figure)


def _differs(rows: Sequence[Row], name: str) -> bool:
    values = [row.quality[name] for row in rows]
    return len({v.mean if isinstance(v, Interval) else v for v in values}) > 1


def _panel(axes: Axes, rows: Sequence[Row], name: str) -> None:
    points = []
    for place, row in enumerate(rows):
        value = row.quality[name]
        if not isinstance(value, Interval):
            continue
        if row.trained == 0:
            axes.axhline(value.mean, color=FROZEN_COLOR, linestyle="--", linewidth=1)
            points.append((None, value.mean, row.label, FROZEN_COLOR))
            continue
        color = PALETTE[place % len(PALETTE)]
        axes.errorbar(
            row.trained,
            value.mean,
            yerr=value.half or 0,
            color=color,
            marker=_MARKERS[place // len(PALETTE) % len(_MARKERS)],
            markersize=5,
            capsize=2.5,
            elinewidth=1,
        )
        points.append((row.trained, value.mean, row.label, color))
    if not points:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no run has it", ha="center", va="center", color="#666666")
        return
    sizes = [x for x, *_ in points if x is not None]
    if sizes:
        axes.set_xscale("log")
        margin = max(1.02, (max(sizes) / min(sizes)) ** 0.1)
        low, high = min(sizes) / margin, max(sizes) * margin
        axes.set_xlim(low, high)
        # Equal budgets lie within a decade, where a logarithmic axis would have no mark with a number.
        narrow, marks = high / low < 4, (1, 3) if high / low > 20 else (1, 2, 5)
        axes.xaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=marks))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
    _label(axes, points)


def _label(axes: Axes, points: Sequence[tuple[float | None, float, str, str]]) -> None:
    """Names in a column on the right, in the order of the points' heights, each with a line to its point."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    ordered = sorted(points, key=lambda point: point[1])
    wanted = [(y - low) / (high - low) for _, y, *_ in ordered]
    for (x, y, text, color), height in zip(ordered, spread(wanted, _LABEL_HEIGHT), strict=True):
        axes.annotate(
            text,
            xy=(right if x is None else x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=_LABEL_SIZE,
            color=color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6},
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near the wanted ones, which ascend, at least `gap` apart, and around the middle of [0, 1] where they fit.

    Neighbours that are too near form a block about the mean of their wanted places.
    """
    blocks: list[
        list[float]
    ] = []  # Each: the sum of wanted places less the offset inside, and the count.
    for place in wanted:
        blocks.append([place, 1])
        while len(blocks) > 1:
            (total, count), (next_total, next_count) = blocks[-2:]
            end = total / count + (count - 1) * gap
            if next_total / next_count - end >= gap - 1e-12:
                break
            blocks[-2:] = [[total + next_total - next_count * count * gap, count + next_count]]
    places = []
    for total, count in blocks:
        places += [total / count + i * gap for i in range(int(count))]
    over, under = max(0.0, places[-1] - 1), max(0.0, -places[0])
    shift = under - over if not (over and under) else 0.0
    return [place + shift for place in places]
