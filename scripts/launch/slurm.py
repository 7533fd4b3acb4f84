"""SLURM: a batch script that saves and requeues itself, as a job array for sweeps.

Sources: the manual pages of sbatch (--signal, --requeue, SLURM_RESTART_COUNT), scancel and srun. JAX reads the processes of a
step from the variables of srun, and takes one GPU a process there (jax/_src/clusters/slurm_cluster.py).
"""

from scripts.launch.command import (
    MISTAKE_STATUS,
    STOPPED_STATUS,
    assign,
    exports,
    select_command,
)
from scripts.launch.config import JobConfig, LaunchConfig, SlurmConfig
from scripts.launch.script import script
from scripts.launch.values import need
from sira_jax.errors import check

# sbatch --signal may come this much earlier than it says.
_SIGNAL_SLACK = 60


def render(config: LaunchConfig) -> dict[str, str]:
    """The files by name.

    Raises:
      ConfigError: a field that SLURM needs is not set, or has no meaning there.
    """
    job, slurm = config.job, config.slurm
    need(job.output, "job.output", "slurm")
    checkout = need(job.checkout, "job.checkout", "slurm")
    check(job.bucket is None, "job.output", job.output, "slurm: a directory that all nodes see")
    check(not job.spot, "job.spot", job.spot, "slurm: the partition or QOS decides that")
    if slurm.time_limit is not None:
        least = job.grace_seconds + _SIGNAL_SLACK
        allowed = f"over job.grace_seconds and a minute, {least} seconds"
        check(seconds(slurm.time_limit) > least, "slurm.time_limit", slurm.time_limit, allowed)
    logs = f"{job.directory}/{job.name}-logs"
    processes = slurm.nodes * max(1, slurm.gpus_per_node)
    batch = script(
        *(f"#SBATCH --{line}" for line in _directives(job, slurm, logs)),
        "",
        assign("CHECKOUT", checkout),
        assign("MAX_RESTARTS", job.max_restarts),
        assign("MISTAKE_STATUS", MISTAKE_STATUS),
        assign("STOPPED_STATUS", STOPPED_STATUS),
        'RUN="${SLURM_ARRAY_TASK_ID:-0}"',
        *select_command(job, processes),
        *exports(job.env),
        "prepare() {",
        *(f"  {line}" for line in slurm.setup),
        "  :",
        "}",
        body_name="slurm.sh",
    )
    submit = script(
        "set -euo pipefail",
        'cd -- "$(dirname -- "${BASH_SOURCE[0]}")"',
        # SLURM does not make the directory of the logs, and loses them without it.
        assign("LOGS", logs),
        'mkdir -p -- "$LOGS"',
        "exec sbatch job.sbatch",
    )
    return {"job.sbatch": batch, "submit.sh": submit}


def _directives(job: JobConfig, slurm: SlurmConfig, logs: str) -> list[str]:
    """The options of sbatch. Their values are held to plain characters by the config: sbatch has its own quoting."""
    options: dict[str, object] = {
        "job-name": job.name,
        "output": f"{logs}/%x-{'%A_%a' if job.sweep else '%j'}.log",
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:TERM@{job.grace_seconds}",
        "nodes": slurm.nodes,
        "ntasks-per-node": max(1, slurm.gpus_per_node),
    }
    if slurm.gpus_per_node:
        options["gpus-per-node"] = slurm.gpus_per_node
    named = {"cpus_per_task": "cpus-per-task", "memory": "mem", "time_limit": "time"}
    for field in ("partition", "account", "qos", "constraint", *named):
        if getattr(slurm, field) is not None:
            options[named.get(field, field)] = getattr(slurm, field)
    if job.sweep:
        limit = f"%{slurm.max_parallel}" if slurm.max_parallel else ""
        options["array"] = f"0-{len(job.sweep) - 1}{limit}"
    return [name if value is None else f"{name}={value}" for name, value in options.items()]


def seconds(time_limit: str) -> int:
    """A time limit of sbatch in seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (60, 1) if not dash and len(parts) < 3 else (3600, 60, 1)
    times = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 86400 + times
