"""A sweep's runs as a job array: files for SLURM and for GKE (an Indexed Job), which run scripts/sweep.py on one run each.

Each element needs one machine. docs/launch.md is about runs over several.
Sources: the manual pages of sbatch (--array, --signal, --requeue); Kubernetes' Job API (completionMode: Indexed).
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.sweep_plan import REPOSITORY
from sira_jax.errors import ConfigError, check

TARGETS = ("slurm", "gke")
# From SIGTERM to SIGKILL: one step and one checkpoint.
GRACE_SECONDS = 120


def slurm(
    runs: Sequence[str], workdir: Path, name: str, parallel: int, options: Sequence[str]
) -> dict[str, str]:
    """The batch script, by its file's name; `sbatch job.sbatch` starts it.

    A job that is stopped saves and is requeued, and goes on from there.

    Args:
      runs: names of the runs to do.
      workdir: the sweep's directory, which all nodes see.
      name: of the job.
      parallel: runs at once.
      options: further options of sbatch, such as "partition=gpu".
    """
    fine = re.fullmatch(r"[\w.+-]+", name)
    check(fine, "--job_name", name, "letters, digits and . _ + -")
    for option in options:
        fine = re.fullmatch(r"[a-z][a-z-]*(=[\w.,:/@%+\[\]&|*()=-]+)?", option)
        check(
            fine, "--sbatch", option, "OPTION or OPTION=VALUE of sbatch, without dashes or spaces"
        )
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --array=0-{len(runs) - 1}%{parallel}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --signal=B:TERM@{GRACE_SECONDS}",
        *(f"#SBATCH --{option}" for option in options),
        "set -u",
        f"cd -- {shlex.quote(str(REPOSITORY))} || exit 1",
        f"RUNS=({shlex.join(runs)})",
        # Before there is a process to stop, or a signal between the two would end this script alone.
        "STOPPED=",
        "trap 'STOPPED=1; kill -TERM $(jobs -p)' TERM",
        f"python scripts/sweep.py --workdir={shlex.quote(str(workdir))}"
        ' --only="${RUNS[$SLURM_ARRAY_TASK_ID]}" &',
        "CHILD=$!",
        'wait "$CHILD"',
        "STATUS=$?",
        # The trap ends the first wait; the second waits for the checkpoint.
        'if [ -n "$STOPPED" ]; then',
        '  wait "$CHILD"',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        "fi",
        'exit "$STATUS"',
    ]
    return {"job.sbatch": "\n".join(lines) + "\n"}


def gke(
    runs: Sequence[str],
    workdir: Path,
    name: str,
    parallel: int,
    image: str | None,
    claim: str | None,
    limits: Sequence[str] = (),
    nodes: Sequence[str] = (),
) -> dict[str, str]:
    """The manifest, by its file's name; `kubectl create -f job.json` starts it.

    Args:
      runs, workdir, name, parallel: see `slurm`; the claim's volume is mounted at `workdir`.
      image: container image with the repository in its working directory.
      claim: PersistentVolumeClaim that holds the sweep's directory.
      limits: what a container gets, such as "nvidia.com/gpu=1".
      nodes: labels of the nodes, such as "cloud.google.com/gke-tpu-topology=2x2".

    Raises:
      ConfigError: a name is not one of Kubernetes', a pair is none, or the image or the claim is missing.
    """
    if not image or not claim:
        raise ConfigError("--jobs=gke needs --image=IMAGE and --claim=PERSISTENTVOLUMECLAIM")
    for flag, value in (("--job_name", name), ("--claim", claim)):
        fine = re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", value)
        check(fine, flag, value, "at most 52 of a-z, 0-9 and -, a letter or digit at both ends")
    command = (
        f"RUNS=({shlex.join(runs)}); exec python scripts/sweep.py"
        f' --workdir={shlex.quote(str(workdir))} --only="${{RUNS[$JOB_COMPLETION_INDEX]}}"'
    )
    container: dict[str, Any] = {
        "name": "run",
        "image": image,
        # Kubernetes expands $(NAME) in commands, and reads $$ as $.
        "command": ["bash", "-c", command.replace("$", "$$")],
        "volumeMounts": [{"name": "sweep", "mountPath": str(workdir)}],
    }
    if limits:
        container["resources"] = {"limits": _pairs("--limit", limits)}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [{"name": "sweep", "persistentVolumeClaim": {"claimName": claim}}],
    }
    if nodes:
        pod["nodeSelector"] = _pairs("--node", nodes)
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": len(runs),
            "parallelism": parallel,
            "backoffLimitPerIndex": 3,
            "template": {"spec": pod},
        },
    }
    return {"job.json": json.dumps(manifest, indent=1) + "\n"}


def _pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    for item in items:
        fine = re.fullmatch(r"[A-Za-z0-9][\w./-]*=[A-Za-z0-9][\w.-]*", item)
        check(fine, flag, item, "NAME=VALUE as Kubernetes has them, such as nvidia.com/gpu=1")
    return dict(item.split("=", 1) for item in items)
