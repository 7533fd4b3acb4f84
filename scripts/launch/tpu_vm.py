"""TPU VM: a loop that keeps one TPU slice and the training on it alive, from any machine with gcloud.

submit.sh creates the slice, installs the checkout on every host and starts the training there with `ssh --worker=all`; after a
preemption or a maintenance event it makes the slice anew and goes on. worker.sh is what the hosts run.

Source: the reference of `gcloud compute tpus tpu-vm` (create, list, scp, ssh, delete) and the states of a TPU node.
"""

from scripts.launch.command import (
    MISTAKE_STATUS,
    STOPPED_STATUS,
    assign,
    assign_list,
    exports,
    select_command,
)
from scripts.launch.config import LaunchConfig
from scripts.launch.script import script
from scripts.launch.values import need
from sira_jax.errors import check


def render(config: LaunchConfig) -> dict[str, str]:
    """The files by name.

    Raises:
      ConfigError: a field that TPU VMs need is not set, or has no meaning there.
    """
    job, tpu = config.job, config.tpu
    need(job.output, "job.output", "tpu_vm")
    check(
        job.bucket is not None,
        "job.output",
        job.output,
        "tpu_vm: gs://BUCKET/PATH; the disks of a TPU VM end with it",
    )
    check(tpu.slices == 1, "tpu.slices", tpu.slices, "1 for tpu_vm; gke and xpk join slices")
    return {"submit.sh": _loop(config), "worker.sh": _worker(config)}


def _loop(config: LaunchConfig) -> str:
    job, google, tpu = config.job, config.google, config.tpu
    options = [
        f"--accelerator-type={tpu.accelerator_type}",
        f"--version={tpu.kind.runtime_version}",
        # Buckets are written with the VM's own identity.
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
    ]
    for name in ("network", "subnetwork", "service_account"):
        if getattr(google, name) is not None:
            options.append(f"--{name.replace('_', '-')}={getattr(google, name)}")
    if job.spot:
        options.append("--spot")
    return script(
        assign("NAME", job.name),
        assign("PROJECT", need(google.project, "google.project", "tpu_vm")),
        assign("ZONE", need(google.zone, "google.zone", "tpu_vm")),
        assign_list("CREATE_OPTIONS", options),
        assign("RUNS", len(job.points)),
        assign("MAX_RESTARTS", job.max_restarts),
        assign("CREATE_ATTEMPTS", google.create_attempts),
        assign("DELETE_WHEN_DONE", int(google.delete_when_done)),
        assign("MISTAKE_STATUS", MISTAKE_STATUS),
        body_name="tpu_vm_loop.sh",
    )


def _worker(config: LaunchConfig) -> str:
    job, google, tpu = config.job, config.google, config.tpu
    # Slices of up to a host's size have one host, the others have hosts of 4 chips.
    single = tpu.chips in tpu.kind.host_sizes
    processes = 1 if single else tpu.chips // 4
    return script(
        assign("NAME", job.name),
        assign("BUCKET", job.bucket),
        assign("REPOSITORY", need(job.repository, "job.repository", "tpu_vm")),
        assign("REVISION", job.revision),
        assign("GRACE_SECONDS", job.grace_seconds),
        assign("MISTAKE_STATUS", MISTAKE_STATUS),
        assign("STOPPED_STATUS", STOPPED_STATUS),
        *exports(job.env),
        "select_command() {",
        *(f"  {line}" for line in select_command(job, processes)),
        "}",
        "prepare() {",
        *(f"  {line}" for line in google.setup),
        "  :",
        "}",
        body_name="tpu_vm_worker.sh",
    )
