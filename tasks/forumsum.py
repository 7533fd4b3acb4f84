"""ForumSum: a forum thread to its summary (Khalman et al. 2021).

Files: forumsum/{train,validation,test}.jsonl with the fields of the TensorFlow dataset of that name: `utterances`,
which are a list of `{author, text}` or, as TensorFlow Datasets gives a sequence of records, two lists `author` and
`text`; and `summary`. The project knows no address to fetch them from, and has not seen the true files. The input is
a line `author: text` for each utterance.
"""

from collections.abc import Mapping

from sira_jax.errors import DataError
from tasks import reading, specs

FOLDER = "forumsum"


def _utterances(row: Mapping) -> list[tuple[str, str]]:
    utterances = row.get("utterances")
    if isinstance(utterances, dict):
        authors = reading.value_of(utterances, list, "author")
        texts = reading.value_of(utterances, list, "text")
        if len(authors) != len(texts):
            raise DataError(f"utterances: {len(authors)} authors of {len(texts)} texts")
        pairs = list(zip(authors, texts, strict=True))
    elif isinstance(utterances, list) and all(isinstance(u, dict) for u in utterances):
        pairs = [(u.get("author"), u.get("text")) for u in utterances]
    else:
        raise DataError("utterances is no list of {author, text}")
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise DataError("utterances has none, or one without author or text")
    return pairs


def _example(row: Mapping) -> specs.Example:
    lines = (f"{author}: {' '.join(text.split())}" for author, text in _utterances(row))
    return {"inputs": "\n".join(lines), "targets": reading.text_of(row, "summary").strip()}


def load(split: str) -> list[specs.Example]:
    """The examples of a split. Raises DataError for missing or damaged files."""
    return reading.read_json_lines(reading.data_file(FOLDER, f"{split}.jsonl"), _example)


specs.add_task(
    specs.TaskSpec(
        name="forumsum",
        description="ForumSum: the summary of a forum thread",
        source=load,
        metrics=("rouge",),
        sizes=dict.fromkeys(specs.SPLITS),
        language="en",
    )
)
