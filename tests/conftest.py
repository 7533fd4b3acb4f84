"""Settings of the whole suite."""

import gc
import os

from tests.quick import QUICK_COMPILE, as_flags

# tests/integration/test_whole_run.py runs the scripts as users do, without these.
os.environ.setdefault("XLA_FLAGS", as_flags(QUICK_COMPILE))


def pytest_collection_finish():
    """Spares the garbage collector what stays anyway, modules and JAX's caches: it took a tenth of the suite's time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
