"""Mixing rates: how often each task of a mixture is drawn."""

import math
from collections.abc import Sequence

from sira_jax.errors import ConfigError, check

STRATEGIES = ("mixture", "equal", "proportional", "temperature")


def equal_rates(sizes: Sequence[int]) -> list[float]:
    """The same rate for every task."""
    return [1.0] * len(sizes)


def proportional_rates(sizes: Sequence[int], *, maximum: int | None = None) -> list[float]:
    """min(size, maximum): each example is drawn as often as any other (T5, section 3.5.2)."""
    return temperature_rates(sizes, temperature=1.0, maximum=maximum)


def temperature_rates(
    sizes: Sequence[int], *, temperature: float, maximum: int | None = None
) -> list[float]:
    """min(size, maximum) ** (1 / temperature) (T5, section 3.5.2).

    A temperature of 1 is proportional to the sizes, of infinity equal.

    Raises:
      ConfigError: temperature below 1, maximum below 1, or a size below 1.
    """
    check(temperature >= 1, "temperature", temperature, "a number of at least 1")
    check(maximum is None or maximum >= 1, "maximum", maximum, "None or at least 1")
    for size in sizes:
        check(size >= 1, "sizes", size, "at least 1 example a task")
    return [min(size, maximum or math.inf) ** (1 / temperature) for size in sizes]


def mixing_rates(
    strategy: str,
    sizes: Sequence[int],
    *,
    own_rates: Sequence[float] | None = None,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> list[float]:
    """The rates of one of STRATEGIES; "mixture" takes `own_rates`, those of its definition.

    Raises ConfigError for another strategy or values out of range.
    """
    if strategy == "mixture" and own_rates is not None:
        return list(own_rates)
    if strategy == "equal":
        return equal_rates(sizes)
    if strategy == "proportional":
        return proportional_rates(sizes, maximum=maximum)
    if strategy == "temperature":
        return temperature_rates(sizes, temperature=temperature, maximum=maximum)
    raise ConfigError(f"mixing={strategy!r} is not allowed: use one of {', '.join(STRATEGIES)}")
