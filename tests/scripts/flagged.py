"""Scripts that define absl flags as they are imported, called in this process."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from absl import flags


@contextlib.contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """The module scripts.NAME, imported anew, with its flags and without those of other scripts, which have the same names."""
    known = flags.FLAGS._flags()
    before = dict(known)
    for flag in before:
        if (flags.FLAGS.find_module_defining_flag(flag) or "").startswith("scripts."):
            del known[flag]
    loaded = sys.modules.pop(f"scripts.{name}", None)
    try:
        yield importlib.import_module(f"scripts.{name}")
    finally:
        for flag in set(flags.FLAGS) - set(before):
            delattr(flags.FLAGS, flag)
        known.clear()
        known.update(before)
        flags.FLAGS.unparse_flags()
        sys.modules.pop(f"scripts.{name}", None)
        if loaded is not None:
            sys.modules[f"scripts.{name}"] = loaded
