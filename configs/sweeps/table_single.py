"""All runs of the table of configs/experiments/table_single.py.

  python scripts/sweep.py --sweep=configs/sweeps/table_single.py:laptop --workdir=runs/tables/laptop/single --dry_run
  python scripts/sweep.py --sweep=configs/sweeps/table_single.py:paper-base,lora,sira --workdir=... --jobs=slurm
  python scripts/sweep.py --sweep=configs/sweeps/table_single.py:laptop/xtreme_up_ner_sw --workdir=...

The argument is SCALE, or SCALE,METHOD,METHOD,... for other methods than the paper's; SCALE/TASK/TASK,... is of other tasks.
"""

from configs.experiments import cells
from configs.experiments.table_single import TASKS
from configs.sweeps.space import Run
from configs.sweeps.tables import read_argument, seed_runs


def get_sweep(argument: str = "laptop") -> list[Run]:
    """A run for each column, method and seed."""
    columns, comma, methods = argument.partition(",")
    scale, *tasks = columns.split("/")
    scale, methods = read_argument(f"{scale}{comma}{methods}")
    tasks = tasks or TASKS[cells.family(scale)]
    names = [f"{scale}/{task}/{method}" for task in tasks for method in methods]
    return seed_runs("table_single", {name: {} for name in names})
