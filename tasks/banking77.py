"""BANKING77: a customer's question to one of 77 intents (Casanueva et al. 2020, PolyAI-LDN/task-specific-datasets, CC BY 4.0).

Files: banking77/train.csv and banking77/test.csv with the columns `text,category`. Validation is 10 % of the training
file, chosen by a hash (`tasks.reading.carve`). The target is the category's name, unchanged: `card_arrival`.
"""

import csv
import io
from pathlib import Path

from sira_jax.errors import DataError
from tasks import reading, specs

FOLDER = "banking77"
COLUMNS = ["text", "category"]
VALIDATION_SHARE = 10


def _example(row: list[str]) -> specs.Example:
    if len(row) != len(COLUMNS) or not all(cell.strip() for cell in row):
        raise DataError(f"{len(row)} cells, where text,category should be")
    reading.check_utf8("".join(row))
    return {"inputs": " ".join(row[0].split()), "targets": row[1].strip()}


def read_file(path: Path) -> list[specs.Example]:
    """The examples of one file. Raises DataError where it is damaged."""
    reader = csv.reader(io.StringIO(reading.read_text(path, by_row=True), newline=""))
    try:
        header = next(reader, None)
        if header != COLUMNS:
            raise DataError(f"{path}, line 1: {header} where the columns {COLUMNS} should be")
        # A quoted cell may run over lines: a row is named by its last one.
        return reading.parse_rows(path, ((reader.line_num, row) for row in reader if row), _example)
    except csv.Error as error:  # a cell of more than 128 KiB, as where a quote is missing
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def load(split: str) -> list[specs.Example]:
    """The examples of a split. Raises DataError for missing or damaged files."""
    name = "test.csv" if split == "test" else "train.csv"
    examples = read_file(reading.data_file(FOLDER, name))
    if split == "test":
        return examples
    return reading.carve(examples, split, share=VALIDATION_SHARE, name=FOLDER)


specs.add_task(
    specs.TaskSpec(
        name="banking77",
        description="BANKING77: the intent of a bank customer's question",
        source=load,
        metrics=("exact_match",),
        sizes={"train": None, "validation": None, "test": 3080},
        language="en",
    )
)
