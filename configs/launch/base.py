"""Defaults of every launch; a launch file calls `get_config` here and changes what differs.

tests/configs holds the fields and defaults to those of scripts/launch/, whose docstrings say more.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Every section. Fields without a value are asked for by the targets that need them."""
    config = ConfigDict()

    config.job = ConfigDict()  # What runs, on any target.
    config.job.name = config_dict.placeholder(str)  # a-z, 0-9 and -.
    config.job.command = config_dict.placeholder(tuple)  # The script and its arguments.
    config.job.sweep = ()  # A tuple of further arguments for each run; itertools.product helps.
    config.job.env = ConfigDict()  # Environment variables, in plain text: no secrets.
    config.job.output = config_dict.placeholder(str)  # /SHARED/DIRECTORY or gs://BUCKET/PATH.
    config.job.image = config_dict.placeholder(str)  # Container image: gke, xpk, xmanager.
    config.job.checkout = config_dict.placeholder(str)  # The repository on the cluster: slurm.
    config.job.repository = config_dict.placeholder(str)  # Git URL to clone: tpu_vm.
    config.job.revision = "main"  # Commit, branch or tag to clone; a commit cannot move.
    config.job.max_restarts = 20  # After stops and failures, before the job counts as failed.
    config.job.grace_seconds = 120  # From SIGTERM to SIGKILL: one step and one checkpoint.
    config.job.spot = False  # Cheaper capacity that may be taken away.

    config.tpu = ConfigDict()  # gke, xpk, tpu_vm.
    config.tpu.generation = "v5e"  # v4 | v5e | v5p | v6e.
    config.tpu.topology = "4x4"  # Chips of a slice: two numbers for v5e and v6e, three else.
    config.tpu.slices = 1  # gke, xpk.

    config.google = ConfigDict()  # gke, xpk, tpu_vm.
    config.google.project = config_dict.placeholder(str)
    config.google.zone = config_dict.placeholder(str)
    config.google.cluster = config_dict.placeholder(str)  # xpk.
    config.google.namespace = "default"  # gke.
    config.google.service_account = config_dict.placeholder(str)  # May write the bucket.
    config.google.queue = config_dict.placeholder(str)  # Kueue LocalQueue: gke.
    config.google.priority = config_dict.placeholder(str)
    config.google.volume_claim = config_dict.placeholder(str)  # For an output that is a path: gke.
    config.google.chips_per_host = 4  # Of the node pool; 1 or 8 for slices of one host: gke.
    config.google.network = config_dict.placeholder(str)  # tpu_vm.
    config.google.subnetwork = config_dict.placeholder(str)  # tpu_vm.
    config.google.setup = ()  # Shell lines after the installation: tpu_vm.
    config.google.create_attempts = 60  # A minute apart: tpu_vm.
    config.google.delete_when_done = True  # An idle slice costs what a busy one does: tpu_vm.

    config.slurm = ConfigDict()  # None leaves an option to the cluster's default.
    config.slurm.partition = config_dict.placeholder(str)
    config.slurm.account = config_dict.placeholder(str)
    config.slurm.qos = config_dict.placeholder(str)
    config.slurm.constraint = config_dict.placeholder(str)
    config.slurm.nodes = 1
    config.slurm.gpus_per_node = 0  # One process a GPU, or one a node without.
    config.slurm.cpus_per_task = config_dict.placeholder(int)
    config.slurm.memory = config_dict.placeholder(str)  # Of a node, as in 64G.
    config.slurm.time_limit = config_dict.placeholder(str)  # As in 12:00:00; saved and requeued.
    config.slurm.setup = ()  # Shell lines before the training, as `source .venv/bin/activate`.
    config.slurm.max_parallel = config_dict.placeholder(int)  # Runs of a sweep at once.

    config.xmanager = ConfigDict()  # One machine with GPUs on Vertex AI.
    config.xmanager.accelerator = "a100"  # Or None, for CPUs alone.
    config.xmanager.count = 1
    config.xmanager.cpus = config_dict.placeholder(int)
    config.xmanager.memory_gib = config_dict.placeholder(int)
    return config
