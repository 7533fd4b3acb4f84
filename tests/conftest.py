"""Settings of the whole suite."""

import gc
import os

# Most of the suite's time is XLA's compilation of small programs that run once: without its costliest passes the suite
# takes about half as long. tests/integration/test_whole_run.py runs the scripts as users do, with them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_finish():
    """Spares the garbage collector what stays anyway, modules and JAX's caches: it took a tenth of the suite's time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
