"""xpk: the commands that create the workloads on a GKE cluster that xpk made.

Source: AI-Hypercomputer/xpk 1.9 (`xpk workload create`, `xpk storage attach`). xpk puts the command into a script that
a shell in the pod runs, and that script into a JobSet; its hosts have 4 chips.
"""

import shlex

from scripts.launch.command import (
    STOPPED_STATUS,
    command,
    kubernetes_literal,
)
from scripts.launch.config import LaunchConfig
from scripts.launch.script import script
from scripts.launch.values import need
from sira_jax.errors import check

# xpk restarts after 42 and 127-255 (signals, errors of the shell) by itself. These are a Python exception and our stop.
_RESTART_STATUSES = f"1,{STOPPED_STATUS}"
_PRIORITIES = ("very-low", "low", "medium", "high", "very-high")


def render(config: LaunchConfig) -> dict[str, str]:
    """The files by name.

    Raises:
      ConfigError: a field that xpk needs is not set, or contradicts another.
    """
    job, google = config.job, config.google
    need(job.output, "job.output", "xpk")
    where = [
        f"--{field}={need(getattr(google, field), f'google.{field}', 'xpk')}"
        for field in ("project", "zone", "cluster")
    ]
    commands = [
        shlex.join(["xpk", "workload", "create", *where, *_options(config, index)])
        for index in range(len(job.points))
    ]
    head = ("set -euo pipefail", 'cd -- "$(mktemp -d)"')
    files = {"submit.sh": script(*head, *commands)}
    if job.bucket:
        attach = (
            *("xpk", "storage", "attach", _storage_name(config), *where, "--type=gcsfuse"),
            *(f"--bucket={job.bucket}", f"--mount-point=/gcs/{job.bucket}"),
            *("--auto-mount=false", "--readonly=false"),
        )
        files["storage.sh"] = script(
            "# Once for a cluster: makes the bucket known to it.",
            "set -euo pipefail",
            shlex.join(attach),
        )
    return files


def _storage_name(config: LaunchConfig) -> str:
    # Kubernetes names it: no dots or underscores, which buckets may have.
    return config.job.bucket.replace(".", "-").replace("_", "-")


def _options(config: LaunchConfig, index: int) -> list[str]:
    job, google, tpu = config.job, config.google, config.tpu
    hosts = max(1, tpu.chips // 4)
    arguments = command(job, index, hosts * tpu.slices)
    variables = [f"{name}={value}" for name, value in job.env.items()]
    # `exec`: xpk forwards SIGTERM to the process it started, which must be the training.
    line = shlex.join(["exec", "env", *variables, *arguments])
    priority = google.priority or "medium"
    check(priority in _PRIORITIES, "google.priority", priority, f"xpk: {', '.join(_PRIORITIES)}")
    options = [
        f"--workload={job.point_name(index)}",
        f"--tpu-type={tpu.kind.type_prefix}-{tpu.topology}",
        f"--num-slices={tpu.slices}",
        f"--docker-image={need(job.image, 'job.image', 'xpk')}",
        f"--priority={priority}",
        f"--max-restarts={job.max_restarts}",
        f"--restart-on-exit-codes={_RESTART_STATUSES}",
        f"--termination-grace-period-seconds={job.grace_seconds}",
        f"--command={kubernetes_literal(line)}",
    ]
    if job.spot:
        options.append("--spot")
    if job.bucket:
        options.append(f"--storage={_storage_name(config)}")
    return options
