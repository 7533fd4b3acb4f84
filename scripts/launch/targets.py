"""The targets by name: each a function of the config that returns its files by name."""

from collections.abc import Callable

from scripts.launch import gke, slurm, tpu_vm, xmanager, xpk
from scripts.launch.config import LaunchConfig

TARGETS: dict[str, Callable[[LaunchConfig], dict[str, str]]] = {
    "slurm": slurm.render,
    "gke": gke.render,
    "tpu_vm": tpu_vm.render,
    "xpk": xpk.render,
    "xmanager": xmanager.render,
}
