"""AfriQA: a question in an African language on a passage in English or French (CC BY 4.0).

Source: Ogundepo et al. 2023, masakhane-io/afriqa.

Files: afriqa_goldp/gold_span_passages.afriqa.<language>.<pivot>.{train,dev,test}.json, JSON lines in spite of their
name. The input has the form of XTREME-UP's cross-language QA with `question_lang`; the target is the answer in the
passage's language, `answer_pivot.text`. Rows without a passage are left out: upstream has some.

Yoruba has no dev file, so that its validation is 10 % of its training file (`tasks.reading.carve`). Swahili has a
test file alone: `afriqa_sw` can be evaluated and not trained on.
"""

import functools
from collections.abc import Mapping

from sira_jax.errors import DataError
from tasks import reading, specs
from tasks.xtreme_up import qa_input

FOLDER = "afriqa_goldp"
VALIDATION_SHARE = 10
# Our code -> upstream's code and the language of the passages.
LANGUAGES: Mapping[str, tuple[str, str]] = {
    "bem": ("bem", "en"),
    "fon": ("fon", "fr"),
    "ha": ("hau", "en"),
    "ig": ("ibo", "en"),
    "rw": ("kin", "en"),
    "sw": ("swa", "en"),
    "tw": ("twi", "en"),
    "yo": ("yor", "en"),
    "zu": ("zul", "en"),
}
_TEST_ONLY, _WITHOUT_DEV = ("sw",), ("yo",)
_FILE_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def _example(row: Mapping) -> specs.Example | None:
    if row.get("context") is None and "context" in row:
        return None
    answers = reading.value_of(row, list, "answer_pivot", "text")
    if not answers or not isinstance(answers[0], str) or not answers[0].strip():
        raise DataError("answer_pivot.text has no answer")
    title = row.get("title") or ""
    if not isinstance(title, str):
        raise DataError("title is no text")
    question = reading.text_of(row, "question_lang")
    return {
        "inputs": qa_input(question, title, reading.text_of(row, "context")),
        "targets": answers[0],
    }


def load(language: str, split: str) -> list[specs.Example]:
    """The examples of a language's split. Raises DataError for missing or damaged files."""
    carved = language in _WITHOUT_DEV and split != "test"
    code, pivot = LANGUAGES[language]
    part = "train" if carved else _FILE_SPLITS[split]
    name = f"gold_span_passages.afriqa.{code}.{pivot}.{part}.json"
    path = reading.data_file(FOLDER, name, source="afriqa")
    examples = reading.read_json_lines(path, _example)
    if carved:
        return reading.carve(examples, split, share=VALIDATION_SHARE, name=f"afriqa_{language}")
    return examples


for _language in LANGUAGES:
    specs.add_task(
        specs.TaskSpec(
            name=f"afriqa_{_language}",
            description=f"AfriQA: cross-language QA, language {_language}",
            source=functools.partial(load, _language),
            metrics=("squad",),
            sizes=dict.fromkeys(("test",) if _language in _TEST_ONLY else specs.SPLITS),
            group="afriqa",
            language=_language,
        )
    )
