"""SiRA's number of experts and of those a token uses, on the CLDR tasks, with three seeds.

  python scripts/sweep.py --sweep=configs/sweeps/sira_experts.py --workdir=runs/experts --dry_run

18 runs; each is one of configs/experiments/compare.py. No result is checked in.
"""

from configs.sweeps.space import Run, grid, product

CONFIG = "configs/experiments/compare.py:sira"


def get_sweep() -> list[Run]:
    """The runs, a seed after the other."""
    sizes = grid({"adapter.num_experts": (4, 8, 16), "adapter.num_selected_experts": (2, 4)})
    return product(grid({"train.seed": (0, 1, 2)}), sizes)
