"""The multitask table: a method on several kinds of task at once, one adapter for all.

  make table-multitask               the whole table at laptop scale, resumable
  python scripts/train.py --config=configs/experiments/table_multitask.py:laptop/swahili/sira --workdir=runs/one

The argument is SCALE/MIXTURE/METHOD. docs/experiments.md has the expected times; no result is checked in.
"""

from ml_collections import ConfigDict

from configs.experiments import cells
from sira_jax.errors import check

MIXTURES = {
    cells.LAPTOP: {
        "swahili": ("cldr_sw",),
        "english": ("cldr_en", "bfcl_simple"),
    },
    cells.PAPER: {
        "swahili": ("multitask_sw",),
        "bengali": ("multitask_bn",),
        "all": ("multitask_all",),
    },
}


def get_config(cell: str = "laptop/swahili/sira") -> ConfigDict:
    """The experiment of a cell."""
    scale, mixture, method = cells.split_cell(cell, 3, "SCALE/MIXTURE/METHOD")
    known = MIXTURES[cells.family(scale)]
    check(mixture in known, "MIXTURE", mixture, f"at this scale one of {', '.join(known)}")
    return cells.experiment(scale, known[mixture], method)
