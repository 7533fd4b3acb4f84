"""What to launch and where: the fields of a launch config, each checked at construction.

One config holds every target's section. A field that a target needs and that has no default is None until it is set, and only
that target asks for it (`need`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from scripts.launch.tpus import TpuConfig
from scripts.launch.values import (
    check_count,
    check_flag,
    check_line,
    check_lines,
    check_pattern,
    check_word,
    need,
)
from sira_jax.errors import ConfigError, check, is_whole_number

# Longer names do not fit, with what Kubernetes and xpk add to them, into a host name of 63 characters.
MAX_NAME = 28
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9._=@+-]+)*")
_DIRECTORY = re.compile(r"(/[A-Za-z0-9._=@+-]+)+")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]*")
# GPUs that XManager's Vertex executor translates.
_GPUS = ("p4", "t4", "l4_24th", "p100", "v100", "a100", "a100_80gib", "h100", "h200", "b200")
_TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+")

# The flags that the renderers add; a command with its own would contradict them.
OWN_FLAGS = ("workdir", "multihost", "stopped_status")


def _check_arguments(field: str, value: object) -> None:
    check(isinstance(value, tuple | list), field, value, "a tuple of arguments")
    for i, argument in enumerate(value):
        check_line(f"{field}[{i}]", argument)
        name = argument.lstrip("-").split("=")[0]
        own = argument.startswith("-") and name in OWN_FLAGS
        check(not own, f"{field}[{i}]", argument, f"the launcher sets {', '.join(OWN_FLAGS)}")


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """What runs: the same for every target.

    Attributes:
      name: of the job, of what it creates and of its directory under `output`.
      command: program and arguments, run in the checkout or the image's working directory: scripts/train.py, or a script with
        the flags that the launcher adds: --workdir, --stopped_status and, with more than one process, --multihost.
      sweep: one tuple of further arguments for each run; each run has its own directory. Empty: one run.
      env: environment variables of the run. They are written into the files in plain text: no secrets.
      output: where run directories go: an absolute path that every host sees, or gs://BUCKET/PATH, which is mounted.
      image: container image (gke, xpk, xmanager); scripts/launch/Dockerfile makes one.
      checkout: directory of the repository on the cluster (slurm).
      repository, revision: git URL and commit, branch or tag that a TPU VM clones (tpu_vm).
      max_restarts: restarts of any kind, after a stop or a failure, before the job counts as failed.
      grace_seconds: from SIGTERM to SIGKILL: time for one step and one checkpoint.
      spot: use capacity that may be taken away.
    """

    name: str
    command: tuple[str, ...]
    sweep: tuple[tuple[str, ...], ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    output: str | None = None
    image: str | None = None
    checkout: str | None = None
    repository: str | None = None
    revision: str = "main"
    max_restarts: int = 20
    grace_seconds: int = 120
    spot: bool = False

    def __post_init__(self):
        fine = isinstance(self.name, str) and _NAME.fullmatch(self.name)
        allowed = f"at most {MAX_NAME} of a-z, 0-9 and -, from a letter to a letter or digit"
        check(fine and len(self.name) <= MAX_NAME, "job.name", self.name, allowed)
        _check_arguments("job.command", self.command)
        check(len(self.command) > 0, "job.command", self.command, "a script and its arguments")
        check(isinstance(self.sweep, tuple | list), "job.sweep", self.sweep, "a tuple of tuples")
        for i, arguments in enumerate(self.sweep):
            _check_arguments(f"job.sweep[{i}]", arguments)
        check(isinstance(self.env, Mapping), "job.env", self.env, "names and values")
        for name, value in self.env.items():
            check_pattern(f"job.env's name {name!r}", name, _VARIABLE, "letters, digits and _")
            check_line(f"job.env.{name}", value)
        if self.output is not None:
            fine = isinstance(self.output, str) and (
                _BUCKET.fullmatch(self.output) or _DIRECTORY.fullmatch(self.output)
            )
            allowed = "/AN/ABSOLUTE/PATH or gs://BUCKET/PATH of letters, digits and . _ = @ + -"
            check(fine, "job.output", self.output, allowed)
        check_pattern("job.image", self.image, _IMAGE, "HOST/PATH:TAG or HOST/PATH@DIGEST")
        check_pattern("job.checkout", self.checkout, _DIRECTORY, "/AN/ABSOLUTE/PATH")
        if self.repository is not None:
            check_line("job.repository", self.repository)
            # git takes a leading dash for an option, and ext:: for a command.
            fine = re.match(r"(https|ssh|git|file)://|git@", self.repository)
            check(fine, "job.repository", self.repository, "https://, ssh://, git:// or file://")
        allowed = "a commit, branch or tag"
        pattern = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
        check_pattern("job.revision", self.revision, pattern, allowed, optional=False)
        check_count("job.max_restarts", self.max_restarts, least=0)
        check_count("job.grace_seconds", self.grace_seconds)
        check_flag("job.spot", self.spot)

    @property
    def bucket(self) -> str | None:
        """The bucket's name if `output` is gs://..., else None."""
        if self.output is None or not self.output.startswith("gs://"):
            return None
        return self.output.removeprefix("gs://").split("/")[0]

    @property
    def directory(self) -> str:
        """Where `output` is found on the hosts: buckets are mounted under /gcs by every target, as Vertex AI does."""
        return need(self.output, "job.output", "any").replace("gs://", "/gcs/", 1)

    @property
    def points(self) -> tuple[tuple[str, ...], ...]:
        """The further arguments of each run."""
        return tuple(map(tuple, self.sweep)) or ((),)

    def point_name(self, index: int) -> str:
        """The name of run `index`: the job's, with its number in a sweep."""
        return f"{self.name}-{index}" if self.sweep else self.name

    def workdir(self, index: int) -> str:
        """The run directory of run `index`."""
        where = f"{self.directory}/{self.name}"
        return f"{where}/{index:04d}" if self.sweep else where


@dataclasses.dataclass(frozen=True)
class GoogleConfig:
    """Google Cloud: tpu_vm, gke and xpk.

    Attributes:
      project, zone: of the TPUs.
      cluster: GKE cluster (xpk).
      namespace: Kubernetes namespace (gke).
      service_account: Kubernetes service account that may write the bucket (gke), or the e-mail address of the TPU VM's.
      queue: Kueue LocalQueue that admits the job (gke).
      priority: PriorityClass of the pods (gke), or very-low to very-high (xpk).
      volume_claim: PersistentVolumeClaim that is mounted at `job.output`, if that is a path (gke).
      chips_per_host: of the node pool: 4, or 1 or 8 for slices of one host (gke).
      network, subnetwork: of a TPU VM; None is the project's default.
      setup: shell lines that run in the checkout on each TPU VM after its installation (tpu_vm). They are code, not quoted.
      create_attempts: how often, a minute apart, a TPU VM is asked for before giving up.
      delete_when_done: delete the TPU VM after the last run. An idle TPU VM is paid for like a busy one.
    """

    project: str | None = None
    zone: str | None = None
    cluster: str | None = None
    namespace: str = "default"
    service_account: str | None = None
    queue: str | None = None
    priority: str | None = None
    volume_claim: str | None = None
    chips_per_host: int = 4
    network: str | None = None
    subnetwork: str | None = None
    setup: tuple[str, ...] = ()
    create_attempts: int = 60
    delete_when_done: bool = True

    def __post_init__(self):
        words = ("project", "zone", "cluster", "namespace", "service_account", "queue")
        for name in (*words, "priority", "volume_claim", "network", "subnetwork"):
            check_word(f"google.{name}", getattr(self, name))
        check(self.namespace is not None, "google.namespace", None, "a namespace's name")
        fine = is_whole_number(self.chips_per_host) and self.chips_per_host in (1, 4, 8)
        check(fine, "google.chips_per_host", self.chips_per_host, "1, 4 or 8")
        check_lines("google.setup", self.setup)
        check_count("google.create_attempts", self.create_attempts)
        check_flag("google.delete_when_done", self.delete_when_done)


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """A SLURM allocation. None leaves the option out, so that the cluster's default holds.

    Attributes:
      partition, account, qos, constraint: as sbatch has them.
      nodes: nodes of a run.
      gpus_per_node: 0 for CPU nodes. There is one process a GPU, or one a node without GPUs.
      cpus_per_task: CPUs of a process.
      memory: of a node, as in 64G.
      time_limit: minutes, HH:MM:SS or D-HH:MM:SS. The job is stopped before it, saved and requeued.
      setup: shell lines that run in the checkout before the training, such as `source .venv/bin/activate`. They are
        code, not quoted.
      max_parallel: how many runs of a sweep at once; None for all.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    memory: str | None = None
    time_limit: str | None = None
    setup: tuple[str, ...] = ()
    max_parallel: int | None = None

    def __post_init__(self):
        for name in ("partition", "account", "qos"):
            pattern, allowed = (
                re.compile(r"[A-Za-z0-9][A-Za-z0-9._,-]*"),
                "letters, digits, . _ , -",
            )
            check_pattern(f"slurm.{name}", getattr(self, name), pattern, allowed)
        pattern, allowed = (
            re.compile(r"[A-Za-z0-9\[][]\w.&|*()\[-]*"),
            "features with & | * ( ) [ ]",
        )
        check_pattern("slurm.constraint", self.constraint, pattern, allowed)
        check_count("slurm.nodes", self.nodes)
        check_count("slurm.gpus_per_node", self.gpus_per_node, least=0)
        check_count("slurm.cpus_per_task", self.cpus_per_task, optional=True)
        check_pattern("slurm.memory", self.memory, re.compile(r"\d+[KMGT]?"), "as in 64G")
        check_pattern(
            "slurm.time_limit", self.time_limit, _TIME, "as in 90, 12:00:00 or 2-00:00:00"
        )
        check_lines("slurm.setup", self.setup)
        check_count("slurm.max_parallel", self.max_parallel, optional=True)


@dataclasses.dataclass(frozen=True)
class XManagerConfig:
    """One machine with GPUs on Vertex AI, through XManager.

    Attributes:
      accelerator: XManager's name of a GPU; None for CPUs alone. XManager's executors know no TPU newer than v3.
      count: GPUs.
      cpus, memory_gib: of the machine, where the GPU does not decide it.
    """

    accelerator: str | None = "a100"
    count: int = 1
    cpus: int | None = None
    memory_gib: int | None = None

    def __post_init__(self):
        fine = self.accelerator is None or self.accelerator in _GPUS
        allowed = f"None or one of {', '.join(_GPUS)}"
        check(fine, "xmanager.accelerator", self.accelerator, allowed)
        check_count("xmanager.count", self.count)
        check_count("xmanager.cpus", self.cpus, optional=True)
        check_count("xmanager.memory_gib", self.memory_gib, optional=True)


SECTIONS = {
    "job": JobConfig,
    "tpu": TpuConfig,
    "google": GoogleConfig,
    "slurm": SlurmConfig,
    "xmanager": XManagerConfig,
}


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """All sections."""

    job: JobConfig
    tpu: TpuConfig
    google: GoogleConfig
    slurm: SlurmConfig
    xmanager: XManagerConfig


def make_launch(config: Mapping[str, Any]) -> LaunchConfig:
    """Builds the config from nested plain data.

    Raises:
      ConfigError: for an unknown section or field, a missing one, or a value that is not allowed.
    """
    unknown = set(config) - set(SECTIONS)
    if unknown:
        known = ", ".join(SECTIONS)
        raise ConfigError(f"config.{min(unknown)}: no such section; a launch config has {known}")
    sections = {}
    for name, section in SECTIONS.items():
        given = config.get(name, {})
        check(isinstance(given, Mapping), name, given, "a mapping of fields")
        fields = {field.name: field for field in dataclasses.fields(section)}
        for field in given:
            if field not in fields:
                raise ConfigError(f"{name}.{field}: no such field; {name} has {', '.join(fields)}")
        for field, entry in fields.items():
            required = (
                entry.default is dataclasses.MISSING
                and entry.default_factory is dataclasses.MISSING
            )
            if required and field not in given:
                raise ConfigError(f"{name}.{field}=None is not allowed: every launch needs it")
        sections[name] = section(**given)
    return LaunchConfig(**sections)
