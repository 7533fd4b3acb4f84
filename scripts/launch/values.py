"""Checks of the values of a launch config; each failure is a ConfigError that names the field, the value and what is allowed.

Values that are quoted on their way to a shell, a YAML file or a Python file (arguments, environment values) may hold any
printable characters; names and paths, which other programs parse in their own ways, are held to plain characters.
"""

import re
from typing import Any

from sira_jax.errors import check, is_whole_number

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")


def need(value: Any, field: str, target: str) -> Any:
    """`value`, or ConfigError if it is not set: the target cannot do without it."""
    check(value is not None, field, value, f"target {target} needs it")
    return value


def check_line(field: str, value: object) -> None:
    """One line of printable text: a newline or a control character would end or corrupt the line it is put on."""
    fine = isinstance(value, str) and value.isprintable()
    check(fine, field, value, "one line of printable text")


def check_pattern(
    field: str, value: object, pattern: re.Pattern, allowed: str, optional: bool = True
) -> None:
    if value is None and optional:
        return
    check(isinstance(value, str) and pattern.fullmatch(value), field, value, allowed)


def check_word(field: str, value: object) -> None:
    check_pattern(field, value, _WORD, "letters, digits and . _ @ -")


def check_count(field: str, value: object, least: int = 1, optional: bool = False) -> None:
    if value is None and optional:
        return
    check(is_whole_number(value) and value >= least, field, value, f"a whole number from {least}")


def check_flag(field: str, value: object) -> None:
    check(isinstance(value, bool), field, value, "True or False")


def check_lines(field: str, value: object) -> None:
    """A tuple of lines."""
    check(isinstance(value, tuple | list), field, value, "a tuple of lines")
    for i, line in enumerate(value):
        check_line(f"{field}[{i}]", line)
