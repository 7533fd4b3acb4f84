"""MTOP: a request to its intents and slots, in six parallel languages (Li et al. 2021; the files are XSemPLR's, CC BY-SA 4.0).

Files: mtop_xsemplr/{train,dev,test}.json, lists of `question` and `mr.slot_intent` by language. Input and target are
unchanged: `[IN:CREATE_CALL [SL:CONTACT Camilla ] ]`. XTREME-UP's semantic parsing is made from the same data and has
files of its own.
"""

import functools
from collections.abc import Mapping

from tasks import reading, specs

FOLDER = "mtop_xsemplr"
FILES: Mapping[str, str] = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
LANGUAGES = ("en", "de", "es", "fr", "hi", "th")


def load(language: str, split: str) -> list[specs.Example]:
    """The examples of a language's split. Raises DataError for missing or damaged files."""

    def parse(row: Mapping) -> specs.Example:
        return {
            "inputs": reading.text_of(row, "question", language),
            "targets": reading.text_of(row, "mr", "slot_intent", language),
        }

    return reading.read_json_list(reading.data_file(FOLDER, FILES[split], source="mtop"), parse)


for _language in LANGUAGES:
    specs.add_task(
        specs.TaskSpec(
            name=f"mtop_{_language}",
            description=f"MTOP semantic parsing, language {_language}",
            source=functools.partial(load, _language),
            metrics=("exact_match",),
            sizes=dict.fromkeys(specs.SPLITS),
            group="mtop",
            language=_language,
        )
    )
