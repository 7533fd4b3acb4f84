"""XManager: a launch script for `xmanager launch` that runs each point of a sweep as a work unit on Vertex AI.

Source: google-deepmind/xmanager 0.7.1. Its Kubernetes executor asks for no TPU chips and its Vertex executor knows TPUs up to
v3 only (xmanager/cloud/kubernetes.py, vertex.py), so that this target is for machines with GPUs.
"""

from scripts.launch.command import command
from scripts.launch.config import LaunchConfig, XManagerConfig
from scripts.launch.script import RENDERED, body, script
from scripts.launch.values import need
from sira_jax.errors import check


def render(config: LaunchConfig) -> dict[str, str]:
    """The files by name.

    Raises:
      ConfigError: a field that XManager needs is not set, or has no meaning there.
    """
    job = config.job
    need(job.output, "job.output", "xmanager")
    check(job.bucket is not None, "job.output", job.output, "xmanager: gs://BUCKET/PATH")
    check(not job.spot, "job.spot", job.spot, "xmanager asks Vertex AI for standard machines")
    runs = [command(job, index, processes=1) for index in range(len(job.points))]
    texts = [("job.command", argument) for run in runs for argument in run]
    for field, text in texts + [(f"job.env.{name}", value) for name, value in job.env.items()]:
        # Kubernetes, below Vertex AI, expands these; how Vertex AI would take an escaped one is not documented.
        check("$(" not in text, field, text, "xmanager: no $(")
    constants = {
        "NAME": job.name,
        "IMAGE": need(job.image, "job.image", "xmanager"),
        "ENV": dict(job.env),
        "REQUIREMENTS": _requirements(config.xmanager),
        "RUNS": runs,
    }
    docstring = f'"""{RENDERED}\n\n  xmanager launch launch.py\n"""\n'
    values = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    launcher = body("xmanager.txt").replace("# CONSTANTS\n", f"{values}\n", 1)
    submit = script(
        "set -euo pipefail",
        'cd -- "$(dirname -- "${BASH_SOURCE[0]}")"',
        "exec xmanager launch launch.py",
    )
    return {"launch.py": docstring + launcher, "submit.sh": submit}


def _requirements(xmanager: XManagerConfig) -> dict[str, int]:
    """Arguments of xm.JobRequirements: numbers of things, and memory in bytes."""
    requirements = {}
    if xmanager.accelerator is not None:
        requirements[xmanager.accelerator] = xmanager.count
    if xmanager.cpus is not None:
        requirements["cpu"] = xmanager.cpus
    if xmanager.memory_gib is not None:
        requirements["ram"] = xmanager.memory_gib * 2**30
    return requirements
