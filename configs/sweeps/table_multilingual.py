"""All runs of the table of configs/experiments/table_multilingual.py.

  python scripts/sweep.py --sweep=configs/sweeps/table_multilingual.py:laptop --workdir=runs/multilingual --dry_run
  python scripts/sweep.py --sweep=configs/sweeps/table_multilingual.py:paper-base,lora,sira --workdir=... --jobs=slurm

The argument is SCALE, or SCALE,METHOD,METHOD,... for other methods than the paper's.
"""

from configs.experiments import cells
from configs.experiments.table_multilingual import MIXTURES
from configs.sweeps.space import Run
from configs.sweeps.tables import read_argument, seed_runs


def get_sweep(argument: str = "laptop") -> list[Run]:
    """A run for each column, method and seed."""
    scale, methods = read_argument(argument)
    columns = MIXTURES[cells.family(scale)]
    names = [f"{scale}/{column}/{method}" for column in columns for method in methods]
    return seed_runs("table_multilingual", {name: {} for name in names})
