"""What the sweeps of the tables share: a run a seed of each cell, all cells with the first seed before the second."""

from collections.abc import Mapping, Sequence

from configs.experiments import cells
from configs.sweeps.space import Run
from sira_jax.errors import check


def seed_runs(
    file: str, fields: Mapping[str, Run], seeds: Sequence[int] = cells.SEEDS
) -> list[Run]:
    """The runs of a table's cells; the sweep leaves out those of the frozen model that only differ in the seed.

    Args:
      file: name of the config in configs/experiments.
      fields: name of a cell, SCALE/COLUMN/ROW -> fields of the experiment that the sweep sets, whatever was chosen before.
      seeds: of each.
    """
    return [
        {
            "config": f"configs/experiments/{file}.py:{name}",
            "name": f"{name.partition('/')[2]}/seed{seed}",
            "train.seed": seed,
            **fields[name],
        }
        for seed in seeds
        for name in fields
    ]


def read_argument(text: str) -> tuple[str, tuple[str, ...]]:
    """SCALE or SCALE,METHOD,METHOD,...: the scale, and the methods, by default the paper's."""
    scale, *methods = text.split(",")
    cells.family(scale)
    check(all(methods), "the sweep's argument", text, "SCALE or SCALE,METHOD,METHOD,...")
    return scale, tuple(methods) or cells.METHODS
