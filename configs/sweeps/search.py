"""The learning rate of each method, judged on the validation split: the same number of runs for every method.

  python scripts/sweep.py --sweep=configs/sweeps/search.py:laptop --workdir=runs/search --choose=validation/loss
  python scripts/sweep.py --sweep=configs/sweeps/table_single.py:laptop --workdir=... --chosen=runs/search/chosen.json

The argument is SCALE, or SCALE,METHOD,METHOD,.... Trained on the multitask mixture in Swahili, with a seed that no table has.
"""

from configs.sweeps.space import Run, grid, product
from configs.sweeps.tables import read_argument

SEED = 100
# No scale besides: under Adam a larger alpha is a larger learning rate.
AXES = {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2)}


def get_sweep(argument: str = "laptop") -> list[Run]:
    """The same grid for each method but the frozen model."""
    scale, methods = read_argument(argument)
    config = "configs/experiments/table_multitask.py"
    starts = [
        {
            "config": f"{config}:{scale}/swahili/{method}",
            "evaluate.split": "validation",
            "train.seed": SEED,
        }
        for method in methods
        if method != "none"
    ]
    return product(starts, grid(AXES))
