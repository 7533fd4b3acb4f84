"""argparse for the scripts that take positional arguments; mistakes end as in `scripts.cli`."""

import argparse
import ast
import sys
from typing import Any, NoReturn

from scripts.cli import USER_ERROR


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints a mistake as one line `error: ...` and exits with status 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        print(f"error: {message} (--help lists the arguments)", file=sys.stderr)
        sys.exit(USER_ERROR)


def at_least_one(text: str) -> int:
    """The type of a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_value(text: str) -> Any:
    """The value of FIELD=VALUE: a Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
