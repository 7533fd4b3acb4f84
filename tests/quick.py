"""How the suite has its programs compiled.

Most of its time is XLA's compilation of small programs that run once. Without the costliest passes, with the older of the two
emitters of loops, and with each program as one module, that takes about a third of the processor time on CPUs.
"""

import os
import subprocess
import sys
from pathlib import Path

QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def as_flags(options: dict[str, object], devices: int | None = None) -> str:
    """Compiler options as XLA_FLAGS has them; `devices` makes so many of the CPU."""
    flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    if devices:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return " ".join(flags)


def run_on_devices(module: str, directory: Path, devices: int = 8) -> str:
    """What `python -m MODULE DIRECTORY` prints in a process of its own, whose CPU is made into several devices."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(directory)],
        cwd=Path(__file__).parents[1],
        env=os.environ
        | {"XLA_FLAGS": as_flags(QUICK_COMPILE, devices=devices), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
