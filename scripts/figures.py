"""The report's figures, and the look that scripts/compare_figure.py shares. Both draw without a display.

Loads are shown as multiples of an even load, so that 1 is even whatever the number of experts.

Axis letters: L layers, E experts, Z tasks, U groups of tasks.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from scripts.run_results import (
    Projection,
    Router,
    Run,
    all_tasks,
    group_languages,
    group_score,
    group_tasks,
    language_name,
    primary_metric,
)

_DPI = 120
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey is the frozen model's.
FROZEN_COLOR = "#8a8a8a"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LOAD_COLORS = "PuOr_r"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.titlesize": 11,
    "image.interpolation": "nearest",
}


def draw_all(runs: Sequence[Run]) -> dict[str, bytes]:
    """Every figure that the runs have data for: file name -> PNG.

    overview.png always; learning_curves.png where something was trained; expert_load_NAME.png,
    gate_entropy_NAME.png and task_routing_NAME.png for each run with routers (the last where the
    routers' tokens are counted by task).
    """
    with matplotlib.rc_context(STYLE):
        figures = {"overview.png": overview(runs)}
        if any(run.metrics for run in runs):
            figures["learning_curves.png"] = learning_curves(runs)
        for run in runs:
            if run.router is None:
                continue
            figures[f"expert_load_{run.name}.png"] = expert_load(run)
            figures[f"gate_entropy_{run.name}.png"] = gate_entropy(run)
            figures[f"task_routing_{run.name}.png"] = task_routing(run)
        return {name: to_png(figure) for name, figure in figures.items() if figure}


def to_png(figure: Figure) -> bytes:
    """The file of a figure."""
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, equal results give equal files.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def panels(count: int, width: float, height: float, across: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of a size in inches, so many side by side."""
    across = min(across, count)
    lines = -(-count // across)
    figure = Figure(figsize=(width * across, height * lines), layout="constrained")
    grid = figure.subplots(lines, across, squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _plain(text: str) -> str:
    """Text that the built-in font has, and that is not read as a formula."""
    return text.encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")


def _colors(runs: Sequence[Run]) -> dict[str, str]:
    trained = [run.name for run in runs if not run.frozen]
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(trained)}
    return colors | {run.name: FROZEN_COLOR for run in runs if run.frozen}


def overview(runs: Sequence[Run]) -> Figure:
    """One wide figure: scores per task group, learning curves, load of the experts."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _score_bars(left, runs)
    validated = any(run.curve("validation/loss")[0] for run in runs)
    _curves(middle, runs, "validation/loss" if validated else "train/loss")
    routed = next((run for run in runs if run.router), None)
    if routed is None:
        _nothing(right, "Load of the experts", "no run has routers")
    else:
        projections = routed.router.alike
        load_LE = np.mean([p.relative_load_LE for p in projections], axis=0)
        image = _load_map(right, load_LE, _load_norm([load_LE]))
        right.set(title=f"{routed.name}: load of the experts, mean over projections")
        right.set(xlabel="expert", ylabel="layer")
        _load_bar(figure, image, right)
    colors = _colors(runs)
    keys = [Patch(color=colors[run.name], label=run.name) for run in runs]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(runs), 8))
    return figure


def _nothing(axes: Axes, title: str, reason: str) -> None:
    axes.set(title=title, xticks=[], yticks=[])
    axes.text(0.5, 0.5, reason, ha="center", va="center", color="#666666")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _score_bars(axes: Axes, runs: Sequence[Run]) -> None:
    split = runs[0].split
    title = f"Right answers on the {split} split, by task group"
    rows = []
    for group, tasks in group_tasks(all_tasks(runs)).items():
        metric = primary_metric(runs, tasks)
        if metric is not None:
            label = group if metric == "exact_match" else f"{group} ({metric})"
            rows.append((label, [group_score(run, metric, tasks) for run in runs]))
    if not rows:
        _nothing(axes, title, f"no run has evaluation_{split}.json")
        return
    means = [(run.evaluation or {"mean": {}})["mean"].get("exact_match") for run in runs]
    if any(mean is not None for mean in means):
        rows.append(("mean exact match", means))
        axes.axhline(len(rows) - 1.5, color="#999999", linewidth=0.8)
    height = 0.8 / len(runs)
    colors = _colors(runs)
    highest = 0.0
    for i, run in enumerate(runs):
        at = [row + (i - (len(runs) - 1) / 2) * height for row in range(len(rows))]
        values = [math.nan if scores[i] is None else scores[i] for _, scores in rows]
        highest = max(highest, np.nanmax([0.0, *values]))
        bars = axes.barh(at, values, height, color=colors[run.name])
        labels = ["" if math.isnan(value) else f"{value:.0f}" for value in values]
        if len(rows) * len(runs) <= 60:
            axes.bar_label(bars, labels, padding=2, fontsize=6.5)
    axes.set_yticks(range(len(rows)), [_plain(label) for label, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title=title, xlabel="exact match (%)", xlim=(0, max(10.0, 1.06 * highest)))


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Training and validation loss against steps, a line a method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, runs, "train/loss")
    _curves(right, runs, "validation/loss")
    lines = {line.get_label(): line for axes in (left, right) for line in axes.lines}
    if lines:
        figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=8)
    return figure


def _curves(axes: Axes, runs: Sequence[Run], name: str) -> None:
    title = {
        "train/loss": "Loss on the training batches",
        "validation/loss": "Loss on the validation split",
    }[name]
    colors = _colors(runs)
    for i, run in enumerate(runs):
        steps, values = run.curve(name)
        if steps:
            marker = _MARKERS[i % len(_MARKERS)] if len(steps) <= 40 else ""
            axes.plot(
                steps, values, marker=marker, markersize=4, color=colors[run.name], label=run.name
            )
    if not axes.lines:
        _nothing(axes, title, "no run has values of it")
        return
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(left=0)


def expert_load(run: Run) -> Figure:
    """Layer x expert, a panel a projection and one of their mean."""
    projections = run.router.projections
    alike = run.router.alike
    panels = [(_short(p, projections), p.relative_load_LE) for p in projections]
    which = "all" if len(alike) == len(projections) else f"{len(alike)} of {len(projections)}"
    mean_LE = np.mean([p.relative_load_LE for p in alike], axis=0)
    panels.append((f"mean over {which} projections", mean_LE))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns + 1, 3.5 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    norm = _load_norm([load_LE for _, load_LE in panels])
    for axes, (name, load_LE) in zip(grid.flat, panels, strict=False):
        image = _load_map(axes, load_LE, norm)
        axes.set(title=name)
        axes.set(xlabel="expert", ylabel="layer")
        axes.label_outer()
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _load_bar(figure, image, grid)
    figure.suptitle(f"{run.name}: load of the experts by layer, {run.split} split")
    return figure


def _short(projection: Projection, all_of_them: Sequence[Projection]) -> str:
    """The last part of a projection's path, where no other has the same."""
    last = [p.name.rpartition("/")[2] for p in all_of_them]
    name = projection.name.rpartition("/")[2]
    return _plain(name if last.count(name) == 1 else projection.name)


def _load_norm(loads: Sequence[np.ndarray]) -> TwoSlopeNorm:
    """Even load in the middle; the top is near the 99.5th percentile, lest one cell pale the rest.

    Where all loads are nearly even, the scale narrows as far as half to one and a half of it.
    """
    values = np.concatenate([load[np.isfinite(load)] for load in loads])
    top = math.ceil(2 * np.percentile(values, 99.5)) / 2
    top = max(top, 1.5)
    bottom = 0.5 if top == 1.5 and values.min() >= 0.5 else 0.0
    return TwoSlopeNorm(1.0, vmin=bottom, vmax=top)


def _load_map(axes: Axes, load_LE: np.ndarray, norm: TwoSlopeNorm) -> Any:
    return _heat_map(axes, load_LE, cmap=_LOAD_COLORS, norm=norm)


def _heat_map(axes: Axes, values: np.ndarray, **kwargs) -> Any:
    # The background is what cells without a value show.
    axes.set_facecolor("#d0d0d0")
    axes.grid(visible=False)
    image = axes.imshow(values, aspect="auto", origin="lower", **kwargs)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))
    return image


def _load_bar(figure: Figure, image: Any, axes: Any) -> None:
    above = np.nanmax(image.get_array()) > image.norm.vmax
    label = "load relative to an even one (1 = even)"
    bar = _color_bar(figure, image, axes, label, extend="max" if above else "neither")
    bottom, top = image.norm.vmin, image.norm.vmax
    ticks = np.union1d(np.arange(bottom, 1, 0.25), MaxNLocator(5).tick_values(1, top))
    ticks = [tick for tick in ticks if bottom <= tick <= top]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])


def gate_entropy(run: Run) -> Figure:
    """Entropy of the router's probabilities and share of dropped pairs, by layer."""
    projections = run.router.projections
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, projection in enumerate(projections):
        look = {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": "-" if projection.name.startswith("attention/") else "--",
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.3,
        }
        statistics = projection.statistics
        left.plot(statistics["gate_entropy"], label=_short(projection, projections), **look)
        right.plot(100 * statistics["dropped_share"], **look)
    for experts in sorted({p.statistics["expert_load"].shape[-1] for p in projections}):
        highest = math.log(experts)
        left.axhline(highest, color="black", linewidth=1, linestyle=":")
        label = f"ln {experts} = {highest:.2f}: all experts equally likely"
        left.annotate(
            label, (0, highest), (2, 2), textcoords="offset points", fontsize=8, va="bottom"
        )
    left.margins(y=0.12)
    right.set_ylim(bottom=0, top=max(right.get_ylim()[1], 1.0))
    left.set(title="Entropy of the router's probabilities", ylabel="gate entropy (nats)")
    right.set(title="Pairs that capacity turned away", ylabel="share of the top-k pairs (%)")
    for axes in (left, right):
        axes.set(xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", title="projection")
    figure.suptitle(f"{run.name}: how the routers decide, {run.split} split")
    return figure


def task_statistics(
    router: Router, groups: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray] | None:
    """Means over projections for groups (U) of tasks, weighing tasks by their tokens.

    Returns None where the routers did not count by task, else with NaN for groups without tokens:
      entropy_UL: gate entropy, nats.
      load_UE: mean over layers of the load relative to an even one.
      distance_UL: total variation distance of the group's load from that of all tasks, 0 to 1.
    """
    projections = router.alike
    if not all("task_tokens" in p.statistics for p in projections):
        return None
    member_UZ = np.array([[task in tasks for task in router.tasks] for tasks in groups.values()])
    entropies, loads, distances = [], [], []
    for statistics in (p.statistics for p in projections):
        tokens_LZ = statistics["task_tokens"]
        if not tokens_LZ.sum():
            return None
        load_LZE = statistics["task_expert_load"]
        weight_LUZ = tokens_LZ[:, None, :] * member_UZ
        total_LU1 = weight_LUZ.sum(-1, keepdims=True)
        weight_LUZ = weight_LUZ / np.where(total_LU1 > 0, total_LU1, np.nan)
        load_LUE = weight_LUZ @ load_LZE
        share_L1Z = (tokens_LZ / tokens_LZ.sum(-1, keepdims=True))[:, None, :]
        distances.append(0.5 * np.abs(load_LUE - share_L1Z @ load_LZE).sum(-1))
        loads.append(load_LUE * load_LUE.shape[-1])
        entropies.append((weight_LUZ @ statistics["task_gate_entropy"][:, :, None])[..., 0])
    return {
        "entropy_UL": np.mean(entropies, axis=0).T,
        "load_UE": np.mean(loads, axis=(0, 1)),
        "distance_UL": np.mean(distances, axis=0).T,
    }


def task_routing(run: Run) -> Figure | None:
    """Gate entropy, load, and distance from all tasks' load, by task group and by language.

    None where the routers did not count by task.
    """
    groupings = {"task group": group_tasks(run.router.tasks)}
    languages = group_languages(run.router.tasks)
    if languages:
        groupings["language"] = {
            f"{language_name(code)} ({code})": tasks for code, tasks in languages.items()
        }
    found = [task_statistics(run.router, groups) for groups in groupings.values()]
    if found[0] is None:
        return None
    counts = [len(groups) for groups in groupings.values()]
    figure = Figure(figsize=(16, 1.8 + 0.3 * sum(counts) + 0.4 * len(counts)), layout="constrained")
    grid = figure.subplots(
        len(counts), 3, squeeze=False, height_ratios=[n + 1 for n in counts], sharex="col"
    )
    looks = {
        "entropy_UL": {"cmap": "cividis", **_limits([s["entropy_UL"] for s in found])},
        "load_UE": {"cmap": _LOAD_COLORS, "norm": _load_norm([s["load_UE"] for s in found])},
        "distance_UL": {"cmap": "Blues", **_limits([s["distance_UL"] for s in found]), "vmin": 0},
    }
    titles = (
        "Gate entropy",
        "Load of the experts, mean over layers",
        "Distance of the load from all tasks'",
    )
    for row, (kind, groups) in enumerate(groupings.items()):
        for column, (name, look) in enumerate(looks.items()):
            axes = grid[row, column]
            _heat_map(axes, found[row][name], **look)
            axes.set_title(titles[column] if row == 0 else "")
            axes.set_yticks(range(len(groups)), [_plain(group) for group in groups])
            axes.invert_yaxis()
            axes.tick_params(labelleft=column == 0)
        grid[row, 0].set_ylabel(kind)
    for axes, label in zip(grid[-1], ("layer", "expert", "layer"), strict=True):
        axes.set_xlabel(label)
    _color_bar(figure, grid[0, 0].images[0], grid[:, 0], "gate entropy (nats)")
    _load_bar(figure, grid[0, 1].images[0], grid[:, 1])
    _color_bar(figure, grid[0, 2].images[0], grid[:, 2], "total variation distance (0 to 1)")
    figure.suptitle(f"{run.name}: routing by task, mean over projections, {run.split} split")
    return figure


def _limits(arrays: Sequence[np.ndarray]) -> dict[str, float]:
    return {
        "vmin": min(float(np.nanmin(array)) for array in arrays),
        "vmax": max(float(np.nanmax(array)) for array in arrays),
    }


def _color_bar(figure: Figure, image: Any, axes: Any, label: str, **kwargs) -> Any:
    bar = figure.colorbar(image, ax=axes, pad=0.02, **kwargs)
    bar.set_label(label)
    bar.ax.grid(visible=False)
    return bar
