"""The table of single tasks: a method on one task.

  make table-single                  the whole table at laptop scale, resumable
  python scripts/train.py --config=configs/experiments/table_single.py:laptop/cldr_date_sw/sira --workdir=runs/one

The argument is SCALE/TASK/METHOD. docs/experiments.md has the expected times; no result is checked in.
"""

from ml_collections import ConfigDict

from configs.experiments import cells

TASKS = {
    cells.LAPTOP: ("cldr_date_sw", "cldr_relative_en", "bfcl_simple"),
    cells.PAPER: (
        "finqa",
        "forumsum",
        "xtreme_up_semantic_parsing_sw",
        "xtreme_up_qa_in_lang_sw",
        "xtreme_up_ner_sw",
        "xtreme_up_semantic_parsing_bn",
        "xtreme_up_qa_in_lang_bn",
        "xtreme_up_qa_cross_lang_bn",
    ),
}


def get_config(cell: str = "laptop/cldr_date_sw/sira") -> ConfigDict:
    """The experiment of a cell; TASK may be any task."""
    scale, task, method = cells.split_cell(cell, 3, "SCALE/TASK/METHOD")
    config = cells.experiment(scale, (task,), method)
    if cells.family(scale) == cells.LAPTOP:
        config.evaluate.examples_per_task = 96  # Of one task alone.
    return config
