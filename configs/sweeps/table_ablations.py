"""All runs of the ablations of configs/experiments/table_ablations.py.

  python scripts/sweep.py --sweep=configs/sweeps/table_ablations.py:laptop --workdir=runs/tables/laptop/ablations --dry_run

The argument is SCALE, or SCALE,ABLATION,ABLATION,... for some of them. What several ablations share is run once.
"""

from configs.experiments import cells
from configs.experiments.table_ablations import ABLATIONS
from configs.sweeps.space import Run
from configs.sweeps.tables import seed_runs
from sira_jax.errors import check


def get_sweep(argument: str = "laptop") -> list[Run]:
    """A run for each value of each ablation and seed."""
    scale, *chosen = argument.split(",")
    cells.family(scale)
    for name in chosen:
        check(name in ABLATIONS, "the sweep's argument", name, f"of {', '.join(ABLATIONS)}")
    fields = {
        f"{scale}/{ablation}/{value}": {f"adapter.{name}": x for name, x in changes.items()}
        for ablation in chosen or ABLATIONS
        for value, changes in ABLATIONS[ablation][1].items()
    }
    return seed_runs("table_ablations", fields)
