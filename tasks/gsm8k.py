"""GSM8K: a word problem to its worked solution (Cobbe et al. 2021, openai/grade-school-math, MIT).

Files: gsm8k/train.jsonl and gsm8k/test.jsonl with `question` and `answer`, which ends in `#### <number>`. Validation
is 5 % of the training file, chosen by a hash (`tasks.reading.carve`). The question is the input and the answer the
target, both unchanged.
"""

from collections.abc import Mapping

from sira_jax.errors import DataError
from tasks import reading, specs
from tasks.qa_metrics import final_number

FOLDER = "gsm8k"
VALIDATION_SHARE = 5


def _example(row: Mapping) -> specs.Example:
    answer = reading.text_of(row, "answer")
    if final_number(answer) is None:
        raise DataError("answer has no number after ####")
    return {"inputs": reading.text_of(row, "question"), "targets": answer}


def load(split: str) -> list[specs.Example]:
    """The examples of a split. Raises DataError for missing or damaged files."""
    name = "test.jsonl" if split == "test" else "train.jsonl"
    examples = reading.read_json_lines(reading.data_file(FOLDER, name), _example)
    if split == "test":
        return examples
    return reading.carve(examples, split, share=VALIDATION_SHARE, name=FOLDER)


specs.add_task(
    specs.TaskSpec(
        name="gsm8k",
        description="GSM8K: a word problem to its worked solution",
        source=load,
        metrics=("number_match",),
        sizes={"train": None, "validation": None, "test": 1319},
        language="en",
    )
)
