"""Checks of fields that several methods have, each naming adapter.FIELD, its value and what is allowed."""

import math

from sira_jax.errors import check, is_finite_number, is_whole_number


def check_count(field: str, value: object, most: int | None = None) -> None:
    """Raises ConfigError unless `value` is a whole number from 1 (to `most`)."""
    is_count = is_whole_number(value) and value >= 1
    allowed = "a whole number of at least 1" + (f" and at most {most}" if most else "")
    check(is_count and (most is None or value <= most), f"adapter.{field}", value, allowed)


def check_not_negative(field: str, value: object) -> None:
    """Raises ConfigError unless `value` is a finite number of at least 0."""
    is_allowed = is_finite_number(value) and value >= 0
    check(is_allowed, f"adapter.{field}", value, "a finite number, 0 or more")


def check_between(field: str, value: object, least: float, most: float = math.inf) -> None:
    """Raises ConfigError unless `value` is a finite number from `least` to `most`."""
    is_allowed = is_finite_number(value) and least <= value <= most
    allowed = f"a number from {least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
    check(is_allowed, f"adapter.{field}", value, allowed)
