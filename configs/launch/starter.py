"""SiRA on SmolLM2-135M: one config for every target. Put your own project, bucket, image and cluster in.

  python scripts/launch/render.py --config=configs/launch/starter.py --target=slurm --out=launch/slurm \
    --config.job.output=/shared/runs
  python scripts/launch/render.py --config=configs/launch/starter.py --target=gke --out=launch/gke

No result: it needs a cluster.
"""

from ml_collections import ConfigDict

from configs.launch import base


def get_config() -> ConfigDict:
    """The launch."""
    config = base.get_config()
    config.job.name = "sira-starter"
    config.job.command = (
        "python",
        "scripts/train.py",
        "--config=configs/experiments/starter.py:sira",
        "--config.data.batch_size=64",
        "--config.train.num_steps=500",
        "--config.train.checkpoint_every=50",
    )
    config.job.output = "gs://my-bucket/runs"
    config.job.image = "us-docker.pkg.dev/my-project/images/sira-jax:0.1.0"
    config.job.checkout = "/shared/sira_jax"
    config.job.repository = "https://git.example.org/sira_jax.git"

    config.tpu.generation = "v5e"
    config.tpu.topology = "4x4"

    config.google.project = "my-project"
    config.google.zone = "us-west4-a"
    config.google.cluster = "my-cluster"
    config.google.service_account = "trainer"
    config.google.setup = ("python scripts/download_data.py smollm2-135m bfcl",)

    config.slurm.nodes = 2
    config.slurm.gpus_per_node = 4
    config.slurm.cpus_per_task = 8
    config.slurm.time_limit = "12:00:00"
    config.slurm.setup = ("source .venv/bin/activate",)
    return config
