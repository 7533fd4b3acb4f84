"""What the T5X scripts share: T5X's own main with this project's tasks and gin files, and a user's mistakes in one line.

Flags are T5X's: --gin_file=FILE (any number; later ones override), --gin.NAME=VALUE, --gin_search_paths, --tfds_data_dir.
Files are looked for in the working directory, in configs/gin and beside T5X.
"""

import importlib
import logging
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sira_jax.errors import ConfigError, SiraError
from sira_jax.t5x_integration import compat

GIN_FILES = Path(__file__).resolve().parents[1] / "configs" / "gin"
USER_ERROR = 2
# What gin says of a macro without a value.
_MISSING = (
    r"(\S+?)/macro\.value set to `%gin\.REQUIRED`",
    r"No bindings specified for '(\S+?)/gin\.macro'",
)


def launch(name: str) -> None:
    """Runs the main of a T5X module, "train", "eval" or "infer", with the command line as it is.

    A SiraError, or a mistake in the gin files, prints one line `error: ...` and exits with status 2.
    """
    guard(lambda: runpy.run_module(f"t5x.{name}", run_name="__main__", alter_sys=True))


def guard(main: Callable[[], Any]) -> None:
    """Runs `main` with T5X prepared, and turns a user's mistake into one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        prepare()
        main()
    except SiraError as error:
        # gin appends where it called from.
        message = str(error).split("In call to configurable")[0]
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(USER_ERROR)


def prepare() -> None:
    """Checks and mends T5X, registers the tasks, and has gin files read as `read_gin` does.

    Raises:
      DependencyError: see `compat.import_t5x`.
    """
    gin_utils = compat.import_t5x("t5x.gin_utils")
    import tasks.registry  # noqa: F401 - registers the tasks

    # gin reports each place where it looks for a file and does not find it as an error.
    logging.getLogger().addFilter(lambda record: record.module != "resource_reader")
    _tolerate_plain_folders()
    parse = gin_utils.parse_gin_flags

    def parse_gin_flags(search_paths, files, bindings, **options):
        paths = [*search_paths, str(GIN_FILES)]
        read_gin(lambda: parse(paths, files or [], bindings, **options), files)

    gin_utils.parse_gin_flags = parse_gin_flags


def _tolerate_plain_folders() -> None:
    """Lets gin pass over folders here that have the name of one of its own, such as a `runs/` with results.

    Python takes such a folder for a package without a file, and gin looks for that file.
    """
    readers = importlib.import_module("gin.config")._FILE_READERS

    def tolerant(is_readable: Callable[[str], bool]) -> Callable[[str], bool]:
        def check(path: str) -> bool:
            try:
                return is_readable(path)
            except TypeError:
                return False

        return check

    readers[:] = [(reader, tolerant(is_readable)) for reader, is_readable in readers]


def read_gin(parse: Callable[[], None], files: list[str] | None) -> None:
    """Calls `parse`; any mistake in the gin files or bindings becomes a ConfigError of one line."""
    if not files:
        raise ConfigError(
            "--gin_file is missing: a model, its sizes, an adapter and a run; see docs/t5x.md"
        )
    try:
        parse()
    except SiraError:
        raise
    except Exception as error:  # gin files import modules, which may raise anything
        text = " ".join(str(error).split()).split(" in config string:")[0]
        for pattern in _MISSING:
            if missing := re.match(pattern, text):
                name = missing[1]
                raise ConfigError(f"{name} is missing: give it by --gin.{name}=VALUE") from None
        raise ConfigError(f"gin files or bindings: {type(error).__name__}: {text[:600]}") from None
