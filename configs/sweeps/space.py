"""How a sweep's runs are made: a grid, a random search, and the product of several. A plain list is a sweep too.

A run is a dictionary from a dotted field of the experiment to its value.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from sira_jax.errors import check

Run = dict[str, Any]
# Draws one value.
Draw = Callable[[random.Random], Any]


def grid(axes: Mapping[str, Iterable[Any]]) -> list[Run]:
    """Every combination of the axes' values, the last axis fastest."""
    listed = [_values(f"grid: {name}", values) for name, values in axes.items()]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*listed)]


def _values(axis: str, values: Any) -> list[Any]:
    # A set has no order, and the order is that of the runs.
    ordered = isinstance(values, Iterable) and not isinstance(values, str | Mapping | Set)
    check(ordered, axis, values, "a list of values")
    found = list(values)
    check(bool(found), axis, found, "at least one value")
    return found


def random_search(count: int, axes: Mapping[str, Iterable[Any] | Draw], seed: int = 0) -> list[Run]:
    """`count` runs, each axis drawn from its values or by its function; the same for the same seed.

    A few values can be drawn twice; a sweep does such a run once.
    """
    check(isinstance(count, int) and count > 0, "random_search: count", count, "at least 1")
    generator = random.Random(seed)
    listed = {
        name: axis if callable(axis) else _values(f"random_search: {name}", axis)
        for name, axis in axes.items()
    }
    return [
        {
            name: axis(generator) if callable(axis) else generator.choice(axis)
            for name, axis in listed.items()
        }
        for _ in range(count)
    ]


def uniform(low: float, high: float) -> Draw:
    """Draws evenly between two numbers."""
    check(low < high, "uniform: low", low, f"under high={high}")
    return lambda generator: generator.uniform(low, high)


def log_uniform(low: float, high: float) -> Draw:
    """Draws evenly on a logarithmic scale, rounded to three digits, which names can show."""
    check(0 < low < high, "log_uniform: low", low, f"over 0 and under high={high}")
    first, last = math.log(low), math.log(high)
    return lambda generator: float(f"{math.exp(generator.uniform(first, last)):.3g}")


def product(*spaces: Sequence[Run]) -> list[Run]:
    """Every combination of one run of each space; a later space's fields win."""
    return [
        {name: value for run in runs for name, value in run.items()}
        for runs in itertools.product(*spaces)
    ]
