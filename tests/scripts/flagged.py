"""Scripts that define absl flags as they are imported, called in this process."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from absl import flags


@contextlib.contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """The module scripts.NAME, whose flags are gone afterwards: other scripts' have the same names."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"scripts.{name}")
    try:
        yield module
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
        del sys.modules[f"scripts.{name}"]
