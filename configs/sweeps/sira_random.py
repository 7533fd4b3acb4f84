"""A random search over SiRA's learning rate, rank and rate of expert dropout, judged on the validation split.

  python scripts/sweep.py --sweep=configs/sweeps/sira_random.py:16 --workdir=runs/random --dry_run

The argument is the number of runs. No result is checked in.
"""

from configs.sweeps.space import Run, log_uniform, product, random_search

CONFIG = "configs/experiments/compare.py:sira"


def get_sweep(count: str = "8") -> list[Run]:
    """The runs; more of them begin with the same ones."""
    drawn = random_search(
        int(count),
        {
            "optimizer.learning_rate": log_uniform(3e-4, 1e-2),
            "adapter.rank": (2, 4, 8),
            "adapter.expert_dropout_rate": (0.0, 0.1, 0.3),
        },
    )
    return product([{"evaluate.split": "validation"}], drawn)
