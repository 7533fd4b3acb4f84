"""Step time against the tokens of a step and against the number of experts. `scripts/benchmark.py --kind=scaling` prints it."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.benchmark_step import make_timed_step, random_base, random_batch
from scripts.timed_step import take_turns
from sira_jax.adapters import SiRAConfig
from sira_jax.models import DecoderConfig

AXES = {"tokens": "tokens a step", "experts": "experts"}


def run_scaling_benchmark(
    config: DecoderConfig,
    adapter: SiRAConfig,
    rows: Sequence[int],
    experts: Sequence[int],
    *,
    length: int,
    repeats: int,
    log: Callable[[str], None] | None = None,
) -> list[dict]:
    """Measures steps of SiRA; all sizes take turns in each round.

    Args:
      config: the model.
      adapter: SiRA, with the number of experts that the series over tokens has.
      rows: rows of a batch, for the series over tokens; the largest is that of the series over experts.
      experts: numbers of experts.
      length: tokens a row.
      repeats: rounds.
      log: called with a line for each size that is compiled.

    Returns:
      A dict for each size: series ("tokens" or "experts"), value, median_s, min_s, and fit_s, the value of the straight
      line through the series' medians (least squares), with its largest relative distance from a median, off_line.
    """
    frozen = random_base(config)
    sizes = {("tokens", length * count): (adapter, count) for count in rows}
    for count in experts:
        sizes["experts", count] = (dataclasses.replace(adapter, num_experts=count), max(rows))
    steps = {}
    for key, (sized, count) in sizes.items():
        batch = random_batch(config.vocab_size, count, length)
        steps[key] = make_timed_step(config, sized, frozen, batch)
        if log:
            log(f"{key[1]} {AXES[key[0]]}: compiled")
    seconds = take_turns(steps, repeats)
    result = []
    for series in AXES:
        keys = [key for key in sizes if key[0] == series]
        medians = [statistics.median(seconds[key]) for key in keys]
        line = np.polynomial.Polynomial.fit([value for _, value in keys], medians, 1)
        fits = [float(line(value)) for _, value in keys]
        off = max(abs(own / fit - 1) for own, fit in zip(medians, fits, strict=True))
        for (_, value), median, fit in zip(keys, medians, fits, strict=True):
            least = min(seconds[series, value])
            row = {"series": series, "value": value, "median_s": median, "min_s": least}
            result.append({**row, "fit_s": fit, "off_line": off})
    return result


def plot_scaling(rows: Sequence[dict], path: Path) -> None:
    """Draws both series with their straight lines into a PNG file."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (series, label) in zip(figure.subplots(1, 2), AXES.items(), strict=True):
        own = [row for row in rows if row["series"] == series]
        values = [row["value"] for row in own]
        axes.plot(values, [row["median_s"] for row in own], "o", label="median of a step")
        axes.plot(values, [row["fit_s"] for row in own], "-", lw=1, label="straight line")
        axes.set(xlabel=label, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
