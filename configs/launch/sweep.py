"""A sweep over SiRA's rank and learning rate: a job array on SLURM, a JobSet or a work unit each elsewhere.

  python scripts/launch/render.py --config=configs/launch/sweep.py --target=slurm --out=launch/sweep \
    --config.job.output=/shared/runs

No result: it needs a cluster.
"""

import itertools

from ml_collections import ConfigDict

from configs.launch import starter

RANKS = (2, 4, 8)
LEARNING_RATES = (1e-3, 3e-3)


def get_config() -> ConfigDict:
    """The launch; run i takes the i-th pair of a rank and a learning rate."""
    config = starter.get_config()
    config.job.name = "sira-ranks"
    config.job.sweep = tuple(
        (f"--config.adapter.rank={rank}", f"--config.optimizer.learning_rate={learning_rate}")
        for rank, learning_rate in itertools.product(RANKS, LEARNING_RATES)
    )
    config.slurm.max_parallel = 2
    return config
