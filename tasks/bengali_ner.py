"""Bengali NER (Karim et al. 2019, Rifat1493/Bengali-NER, MIT).

Files: ner_bengali/train_data.txt and ner_bengali/test_data.txt: a token, a tab and a tag a line, an empty line after
each sentence. Tags are O, B- and I- of PER, LOC, ORG, and TIM, which has no B- and I-. Validation is 10 % of the
training file, chosen by a hash (`tasks.reading.carve`). Input and target have the form of XTREME-UP's NER; tokens are
joined by spaces.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sira_jax.errors import DataError
from tasks import reading, specs
from tasks.masakhaner import span_target

FOLDER = "ner_bengali"
VALIDATION_SHARE = 10
_TAG = re.compile(r"O|TIM|[BI]-(?:PER|LOC|ORG)")


def _cells(line: str) -> tuple[str, str]:
    """Token and tag of a line. Raises DataError where it is damaged."""
    # A few lines hold a tab too many.
    cells = [cell.strip() for cell in line.split("\t") if cell.strip()]
    if len(cells) != 2 or not _TAG.fullmatch(cells[1]):
        raise DataError(f"{line!r} is no token, tab and tag")
    reading.check_utf8(line)
    return cells[0], cells[1]


def _sentences(text: str) -> Iterator[tuple[int, list[str]]]:
    """The number of a sentence's first damaged line, else of its first line, and its lines."""
    first, damaged, lines = 1, None, []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            lines.append(line)
            try:
                _cells(line)
            except DataError:
                damaged = damaged or number
        else:
            if lines:
                yield damaged or first, lines
            first, damaged, lines = number + 1, None, []


def entities(tokens: Sequence[str], tags: Sequence[str]) -> list[tuple[str, str]]:
    """The (label, words) pairs of a tagged sentence.

    B- begins an entity; I- and TIM go on with one of their label, or begin one.
    """
    found: list[tuple[str, list[str]]] = []
    previous = None
    for token, tag in zip(tokens, tags, strict=True):
        label = tag.rpartition("-")[2]
        if tag == "O":
            label = None
        elif not tag.startswith("B-") and label == previous:
            found[-1][1].append(token)
        else:
            found.append((label, [token]))
        previous = label
    return [(label, " ".join(words)) for label, words in found]


def _example(lines: Sequence[str]) -> specs.Example:
    tokens, tags = zip(*map(_cells, lines), strict=True)
    return {"inputs": " ".join(tokens), "targets": span_target(entities(tokens, tags))}


def read_file(path: Path) -> list[specs.Example]:
    """The sentences of one file; one is damaged with any of its lines. Raises DataError where too many are."""
    sentences = _sentences(reading.read_text(path, by_row=True))
    return reading.parse_rows(path, sentences, _example, unit="sentence", number_unit="line")


def load(split: str) -> list[specs.Example]:
    """The examples of a split. Raises DataError for missing or damaged files."""
    name = "test_data.txt" if split == "test" else "train_data.txt"
    examples = read_file(reading.data_file(FOLDER, name, source="bengali_ner"))
    if split == "test":
        return examples
    return reading.carve(examples, split, share=VALIDATION_SHARE, name=FOLDER)


specs.add_task(
    specs.TaskSpec(
        name="bengali_ner",
        description="Bengali NER in XTREME-UP's form",
        source=load,
        metrics=("span_f1",),
        sizes=dict.fromkeys(specs.SPLITS),
        language="bn",
    )
)
