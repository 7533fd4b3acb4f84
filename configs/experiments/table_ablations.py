"""The ablations, on the multitask mixture in Swahili: k, capacity C, the rank of LoRA, and the regulariser.

  make table-ablations               all of them at laptop scale, resumable
  python scripts/train.py --config=configs/experiments/table_ablations.py:laptop/k/2 --workdir=runs/one

The argument is SCALE/ABLATION/VALUE. docs/experiments.md has the expected times; no result is checked in.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cells, table_multitask
from sira_jax.errors import check

# Ablation -> the method, and name of a value -> the adapter's fields.
ABLATIONS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "k": ("sira", {str(k): {"num_selected_experts": k} for k in (1, 2, 4, 8)}),
    "capacity": (
        "sira",
        {
            "0.5": {"capacity_factor": 0.5},
            "1": {"capacity_factor": 1.0},
            "1.25": {"capacity_factor": 1.25},
            "2": {"capacity_factor": 2.0},
            "unlimited": {"capacity_factor": None},
        },
    ),
    # The scale alpha / rank stays 2.
    "rank": ("lora", {str(r): {"rank": r, "alpha": 2.0 * r} for r in (1, 4, 16, 64)}),
    "regularizer": (
        "sira",
        {
            "load_balance+expert_dropout": {
                "router_regularizer": ("load_balance", "expert_dropout")
            },
            "load_balance": {"router_regularizer": ("load_balance",)},
            "expert_dropout": {"router_regularizer": ("expert_dropout",)},
            "smoe_dropout": {"router_regularizer": ("smoe_dropout",)},
            "none": {"router_regularizer": ("none",)},
        },
    ),
}
MIXTURE = "swahili"


def get_config(cell: str = "laptop/k/4") -> ConfigDict:
    """The experiment of a cell."""
    scale, ablation, value = cells.split_cell(cell, 3, "SCALE/ABLATION/VALUE")
    check(ablation in ABLATIONS, "ABLATION", ablation, f"one of {', '.join(ABLATIONS)}")
    method, values = ABLATIONS[ablation]
    check(value in values, "VALUE", value, f"for {ablation} one of {', '.join(values)}")
    tasks = table_multitask.MIXTURES[cells.family(scale)][MIXTURE]
    return cells.experiment(scale, tasks, method, **values[value])
