"""DialogSum: a dialogue to its summary (Chen et al. 2021, cylnlp/dialogsum, CC BY-NC-SA 4.0).

Files: dialogsum/dialogsum.{train,dev,test}.jsonl with `dialogue` and `summary`; the test file has three summaries a
dialogue, `summary1` to `summary3`. The first is the target, and ROUGE is the mean over all (`references`, a JSON
list).
"""

import json
from collections.abc import Mapping

from tasks import reading, specs

FOLDER = "dialogsum"
FILES: Mapping[str, str] = {
    "train": "dialogsum.train.jsonl",
    "validation": "dialogsum.dev.jsonl",
    "test": "dialogsum.test.jsonl",
}
_TEST_SUMMARIES = ("summary1", "summary2", "summary3")


def load(split: str) -> list[specs.Example]:
    """The examples of a split. Raises DataError for missing or damaged files."""
    names = _TEST_SUMMARIES if split == "test" else ("summary",)

    def parse(row: Mapping) -> specs.Example:
        summaries = [reading.text_of(row, name).strip() for name in names]
        return {
            "inputs": reading.text_of(row, "dialogue").strip(),
            "targets": summaries[0],
            "references": json.dumps(summaries, ensure_ascii=False),
        }

    return reading.read_json_lines(reading.data_file(FOLDER, FILES[split]), parse)


specs.add_task(
    specs.TaskSpec(
        name="dialogsum",
        description="DialogSum: the summary of a dialogue",
        source=load,
        metrics=("rouge",),
        sizes={"train": 12460, "validation": 500, "test": 500},
        extra_fields=("references",),
        language="en",
    )
)
