"""SNIPS: a request to its intent and slots (Coucke et al. 2018, sonos/nlu-benchmark, CC0 1.0).

Files: snips/train_<Intent>_full.json and snips/validate_<Intent>.json, of seven intents. Upstream's validation files
are the customary test split; validation is 5 % of the training files, chosen by a hash (`tasks.reading.carve`).

The target has the form of MTOP and XTREME-UP's semantic parsing: `[IN:GetWeather [SL:country France ] [SL:timeRange
now ] ]`.
"""

from collections.abc import Mapping
from pathlib import Path

from sira_jax.errors import DataError
from tasks import reading, specs

FOLDER = "snips"
INTENTS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)
VALIDATION_SHARE = 5


def _example(intent: str, row: Mapping) -> specs.Example:
    pieces = reading.value_of(row, list, "data")
    texts, slots = [], []
    for piece in pieces:
        if not isinstance(piece, dict) or not isinstance(piece.get("text"), str):
            raise DataError("data holds a piece without text")
        texts.append(piece["text"])
        if "entity" in piece:
            reading.text_of(piece, "entity")
            slots.append(f"[SL:{piece['entity']} {' '.join(piece['text'].split())} ] ")
    request = " ".join("".join(texts).split())
    if not request:
        raise DataError("data holds no text")
    return {"inputs": request, "targets": f"[IN:{intent} {''.join(slots)}]"}


def read_file(path: Path, intent: str) -> list[specs.Example]:
    """The examples of one file. Raises DataError where it is damaged."""
    # One of upstream's files is Latin-1.
    content = reading.read_json(path, fallback="latin-1")
    items = content.get(intent) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list {intent!r}")

    def parse(row: object) -> specs.Example:
        if not isinstance(row, dict):
            raise DataError("no JSON object")
        return _example(intent, row)

    return reading.parse_rows(path, enumerate(items, start=1), parse, unit="item")


def load(split: str) -> list[specs.Example]:
    """The examples of a split, intent after intent. Raises DataError for missing or damaged files."""
    examples: list[specs.Example] = []
    for intent in INTENTS:
        name = f"validate_{intent}.json" if split == "test" else f"train_{intent}_full.json"
        examples += read_file(reading.data_file(FOLDER, name), intent)
    if split == "test":
        return examples
    return reading.carve(examples, split, share=VALIDATION_SHARE, name=FOLDER)


specs.add_task(
    specs.TaskSpec(
        name="snips",
        description="SNIPS: intent and slots of a request",
        source=load,
        metrics=("exact_match",),
        sizes={"train": None, "validation": None, "test": 700},
        language="en",
    )
)
