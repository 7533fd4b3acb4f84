"""Settings of the whole suite."""

import os

# Most of the suite's time is XLA's compilation of small programs that run once: without its costliest passes the suite
# takes about half as long. tests/integration/test_whole_run.py runs the scripts as users do, with them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
