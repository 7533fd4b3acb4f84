"""MasakhaNER-X: the NER task of XTREME-UP, in 20 African languages (CC BY-NC 4.0).

Source: Ruder et al. 2023, masakhane-io/masakhane-ner.

Files: ner_masakhaner_x/{train,validation,test}/<language>.jsonl with `text` and `spans` of bytes. XTREME-UP's own
archive leaves NER out and names this as its source; the tasks are `xtreme_up_ner_sw` and so on.

As XTREME-UP's preprocessing has it, the input is the text and the target `LABEL: entity $$ LABEL: entity`, empty
without entities.
"""

import functools
from collections.abc import Iterable, Mapping

from sira_jax.errors import DataError
from tasks import reading, specs
from tasks.qa_metrics import SPAN_DELIMITER

FOLDER = "ner_masakhaner_x"
GROUP = "xtreme_up_ner"


def codes(text: str) -> tuple[str, ...]:
    """The language codes of a list with spaces between them."""
    return tuple(text.split())


LANGUAGES = codes("am bm bbj ee ha ig rw lg luo mos ny pcm sn sw tn tw wo xh yo zu")


def span_target(spans: Iterable[tuple[str, str]]) -> str:
    """`LABEL: entity $$ LABEL: entity` of (label, entity) pairs, in their order."""
    return f" {SPAN_DELIMITER} ".join(f"{label}: {entity}" for label, entity in spans)


def _example(row: Mapping) -> specs.Example:
    text = reading.text_of(row, "text")
    data = text.encode()
    spans = []
    for span in reading.value_of(row, list, "spans"):
        if not isinstance(span, dict):
            raise DataError("spans holds something that is no object")
        start = reading.value_of(span, int, "start_byte")
        limit = reading.value_of(span, int, "limit_byte")
        if not 0 <= start < limit <= len(data):
            raise DataError(f"span {start}:{limit} of a text of {len(data)} bytes")
        try:
            entity = data[start:limit].decode()
        except UnicodeDecodeError:
            raise DataError(f"span {start}:{limit} cuts a character") from None
        spans.append((reading.text_of(span, "label"), entity))
    # A tab would end the text in upstream's own files.
    return {"inputs": text.replace("\t", " "), "targets": span_target(spans).replace("\t", " ")}


def load(language: str, split: str) -> list[specs.Example]:
    """The examples of a language's split. Raises DataError for missing or damaged files."""
    path = reading.data_file(FOLDER, f"{split}/{language}.jsonl", source="masakhaner_x")
    return reading.read_json_lines(path, _example)


for _language in LANGUAGES:
    specs.add_task(
        specs.TaskSpec(
            name=f"{GROUP}_{_language}",
            description=f"XTREME-UP NER (MasakhaNER-X), language {_language}",
            source=functools.partial(load, _language),
            metrics=("span_f1",),
            sizes=dict.fromkeys(specs.SPLITS),
            group=GROUP,
            language=_language,
        )
    )
