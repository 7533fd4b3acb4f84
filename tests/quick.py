"""How the suite has its programs compiled.

Most of its time is XLA's compilation of small programs that run once. Without the costliest passes, with the older of the two
emitters of loops, and with each program as one module, that takes about a third of the processor time on CPUs.
"""

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
