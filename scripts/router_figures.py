"""The pictures of a router's analysis that the report has not: training, information by layer, and what experts prefer."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts.figures import PALETTE, STYLE, to_png
from scripts.router_information import Told
from scripts.run_results import Run

_MAX_TASKS = 12


def training(run: Run) -> bytes | None:
    """Gate entropy, drops and the effective number of experts over training; None where the run logged none."""
    steps, entropies = run.curve("train/router/gate_entropy")
    if not steps:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        tasks = sorted(
            {n for line in run.metrics for n in line if n.startswith("train/router/gate_entropy/")}
        )
        for i, name in enumerate(tasks[:_MAX_TASKS]):
            color = PALETTE[i % len(PALETTE)]
            left.plot(
                *run.curve(name), color=color, alpha=0.6, linewidth=1, label=name.rpartition("/")[2]
            )
        left.plot(steps, entropies, color="black", linewidth=2, label="all tokens")
        left.set(title="Gate entropy, mean over routers", ylabel="nats")
        if len(left.lines) > 1:
            left.legend(fontsize=6.5)
        steps, shares = run.curve("train/router/dropped_share")
        middle.plot(steps, [100 * share for share in shares], color=PALETTE[0])
        middle.set(title="Pairs that capacity turned away", ylabel="%", ylim=(0, None))
        points = [(line["step"], effective_experts(line)) for line in run.metrics]
        points = [(step, value) for step, value in points if value is not None]
        if points:
            right.plot(*zip(*points, strict=True), color=PALETTE[1])
        right.set(title="Effective number of experts, exp of the load's entropy", ylabel="experts")
        for axes in (left, middle, right):
            axes.set_xlabel("optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return to_png(figure)


def effective_experts(line: Mapping[str, float | None]) -> float | None:
    """exp of the entropy of the load over an expert's number in a line of metrics.jsonl; None where it has none."""
    load = [
        v for n, v in line.items() if n.startswith("train/router/expert_load/") and v is not None
    ]
    if not load or sum(load) <= 0:
        return None
    share = np.array(load) / sum(load)
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def information_by_layer(found: Mapping[str, Told]) -> bytes:
    """For each labelling the information in each layer, a line a projection, with its
    shufflings' range and what it was before training."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(found), 4.2), layout="constrained")
        grid = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, told) in zip(grid, found.items(), strict=True):
            for i, (projection, real_L) in enumerate(told.real_L.items()):
                color = PALETTE[i % len(PALETTE)]
                axes.plot(real_L, color=color, marker=".", label=projection)
                axes.plot(told.fresh_L[projection], color=color, linestyle="--", linewidth=0.8)
                chance_NL = told.shuffled_NL[projection]
                layers = range(len(real_L))
                axes.fill_between(
                    layers, chance_NL.min(0), chance_NL.max(0), color=color, alpha=0.2
                )
            axes.set(
                title=f"{name} (at most {told.bound:.2f} nats)", xlabel="layer", ylim=(0, None)
            )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[0].set_ylabel("information about it, nats")
        handles = {line.get_label(): line for axes in grid for line in axes.lines[::2]}
        figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=7, fontsize=7)
        return to_png(figure)


def preferences(
    title: str, rows: Sequence[str], lift_UE: np.ndarray, shares: Sequence[float]
) -> bytes:
    """A heat map: how much more often than on average a group's tokens meet each expert.

    Args:
      title: heading.
      rows: names of the groups.
      lift_UE: load of the group over the load of all, 1 where they are alike.
      shares: share of the tokens in each group.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(2.5 + 0.4 * lift_UE.shape[1], 1.6 + 0.3 * len(rows)), layout="constrained"
        )
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(
            np.log2(np.clip(lift_UE, 1 / 8, 8)), cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto"
        )
        labels = [f"{name} ({100 * share:.0f}%)" for name, share in zip(rows, shares, strict=True)]
        axes.set_yticks(range(len(rows)), labels)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=title, xlabel="expert")
        bar = figure.colorbar(image, ax=axes)
        bar.set_ticks([-3, 0, 3], labels=["1/8", "1", "8"])
        bar.set_label("load over that of all tokens")
        return to_png(figure)
