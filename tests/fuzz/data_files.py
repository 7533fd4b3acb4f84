"""The data sets' files: written by hand, and parts of the true ones where they are ($SIRA_TEST_DATA, the cache)."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np

import tasks
from tasks import bfcl, reading
from tasks.download import cache_root
from tests.tasks import datasets

# Data set's folder -> task and split that read it.
DATA: Mapping[str, tuple[str, str]] = {
    "snips": ("snips", "train"),
    "gsm8k": ("gsm8k", "train"),
    "banking77": ("banking77", "train"),
    "ner_bengali": ("bengali_ner", "train"),
    "ner_masakhaner_x": ("xtreme_up_ner_sw", "test"),
    "xtreme_up": ("xtreme_up_qa_in_lang_bn", "test"),
    "xtreme_up_parsing": ("xtreme_up_semantic_parsing_sw", "test"),
    "forumsum": ("forumsum", "test"),
    "finqa": ("finqa", "test"),
    "mtop_xsemplr": ("mtop_de", "test"),
    "afriqa_goldp": ("afriqa_ha", "test"),
    "dialogsum": ("dialogsum", "test"),
    "bfcl": ("bfcl_simple", "train"),
}


def make_data(folder: Path) -> None:
    """Each data set in a folder of its own, with the files that its task reads alone."""
    everything = folder / "all"
    datasets.write_all(everything)
    _write_bfcl(everything / "bfcl")
    for name, (task, split) in DATA.items():
        _take(everything, task, split, folder / name)
    shutil.rmtree(everything)


def _take(root: Path, task: str, split: str, to: Path) -> None:
    for path in _read_by(root, task, split):
        copy = to / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    assert to.is_dir(), to


def _read_by(root: Path, task: str, split: str) -> list[Path]:
    """The files that a task reads."""
    if task.startswith("bfcl"):
        return [path for path in (root / "bfcl").rglob("*") if path.is_file()]
    with mock.patch.object(reading, "data_file", wraps=reading.data_file) as data_file:
        read_task(root, task, split)
    return [root / call.args[0] / call.args[1] for call in data_file.call_args_list]


def _write_bfcl(folder: Path) -> None:
    rows, answers = [], []
    for place in range(20):
        types = {"a": "integer", "b": "array", "c": "dict"}
        properties = {
            "a": {"type": "integer", "description": "n", "default": 3},
            "b": {"type": "array", "items": {"type": "string"}, "enum": ["x"]},
            "c": {"type": "dict", "properties": {"k": {"type": "string"}}},
        }
        assert types.keys() == properties.keys()
        schema = {"type": "dict", "properties": properties, "required": ["a"]}
        function = {"name": f"f{place}", "description": "Does.", "parameters": schema}
        messages = [{"role": "user", "content": f"Do {place}"}]
        rows.append({"id": f"i{place}", "question": [messages], "function": [function]})
        allowed = {"a": [place], "b": [["x", "y"], ""], "c": [{"k": ["v", ""]}, ""]}
        answers.append({"id": f"i{place}", "ground_truth": [{f"f{place}": allowed}]})
    for name in bfcl.FILES.values():
        datasets.write_lines(folder / name, rows)
        datasets.write_lines(folder / "possible_answer" / name, answers)


def read_task(root: Path, name: str, split: str) -> None:
    """Reads a task's files below a folder and scores the task's own targets, as evaluation does."""
    os.environ["SIRA_DATA_DIR"] = str(root)
    task = tasks.load_task(name, split, "bytes")
    for example in task.examples:
        assert all(isinstance(value, str) for value in example.values()), example
    predictions = [example["targets"] for example in task.examples]
    scores = tasks.evaluate(task.metrics, predictions, task.examples)
    assert all(np.isfinite(list(scores.values()))), scores


def load_data(folder: Path) -> None:
    read_task(folder, *DATA[folder.name])


# True files.

SAMPLES = Path(os.environ.get("SIRA_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
_ITEMS = 40  # kept of each list, and of the lines of each file five times as many
REAL: Mapping[str, tuple[str, str]] = {
    "banking77": ("banking77", "test"),
    "gsm8k": ("gsm8k", "test"),
    "dialogsum": ("dialogsum", "test"),
    "ner_bengali": ("bengali_ner", "test"),
    "ner_masakhaner_x": ("xtreme_up_ner_sw", "test"),
    "afriqa_goldp": ("afriqa_ha", "test"),
    "mtop_xsemplr": ("mtop_de", "test"),
    "finqa": ("finqa", "test"),
    "snips": ("snips", "test"),
    "bfcl": ("bfcl_simple", "train"),
}
_PARTS = {"finqa_test_partial.jsonl": "test.json"}


def real_folders() -> dict[str, Path]:
    """Data set -> where its true files are, of those that are there."""
    places = {name: SAMPLES / name for name in REAL} | {"bfcl": cache_root() / "bfcl"}
    return {name: place for name, place in places.items() if place.is_dir()}


def make_real_data(folder: Path) -> None:
    for name, source in real_folders().items():
        everything = folder / "all" / name
        for path in source.rglob("*.*"):
            if path.suffix in (".json", ".jsonl", ".csv", ".txt") and path.is_file():
                copy = everything / path.relative_to(source).with_name(
                    _PARTS.get(path.name, path.name)
                )
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(_beginning(path))
        _take(folder / "all", *REAL[name], folder / name)
        shutil.rmtree(folder / "all")


def _beginning(path: Path) -> bytes:
    """Of a file, so that a case takes milliseconds."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except ValueError:
        lines = data.splitlines(keepends=True)[: 5 * _ITEMS]
        if path.name in _PARTS:  # lines here, one list upstream
            return json.dumps([json.loads(line) for line in lines[:_ITEMS]]).encode()
        return b"".join(lines)
    if isinstance(content, dict):
        content = {
            key: value[:_ITEMS] if isinstance(value, list) else value
            for key, value in content.items()
        }
    return json.dumps(content[:_ITEMS] if isinstance(content, list) else content).encode()


def load_real_data(folder: Path) -> None:
    read_task(folder, *REAL[folder.name])
