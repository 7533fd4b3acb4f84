"""The multilingual table: a method on one kind of task in several languages, one adapter for all.

  make table-multilingual            the whole table at laptop scale, resumable
  python scripts/train.py --config=configs/experiments/table_multilingual.py:laptop/date/sira --workdir=runs/one

The argument is SCALE/MIXTURE/METHOD. docs/experiments.md has the expected times; no result is checked in.
"""

from ml_collections import ConfigDict

from configs.experiments import cells
from sira_jax.errors import check

LANGUAGES = ("en", "sw", "bn", "te", "am")
MIXTURES = {
    cells.LAPTOP: {
        "date": tuple(f"cldr_date_{language}" for language in LANGUAGES),
        "relative": tuple(f"cldr_relative_{language}" for language in LANGUAGES),
    },
    cells.PAPER: {
        "semantic_parsing": ("xtreme_up_semantic_parsing",),
        "qa_in_lang": ("xtreme_up_qa_in_lang",),
        "qa_cross_lang": ("xtreme_up_qa_cross_lang",),
        "ner": ("xtreme_up_ner",),
    },
}


def get_config(cell: str = "laptop/date/sira") -> ConfigDict:
    """The experiment of a cell."""
    scale, mixture, method = cells.split_cell(cell, 3, "SCALE/MIXTURE/METHOD")
    known = MIXTURES[cells.family(scale)]
    check(mixture in known, "MIXTURE", mixture, f"at this scale one of {', '.join(known)}")
    return cells.experiment(scale, known[mixture], method)
