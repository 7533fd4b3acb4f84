"""Request + function schema -> function call, from the Berkeley Function Calling Leaderboard.

The data (BFCL v4, Apache-2.0) are files of the wheel `bfcl-eval`, which
`scripts/download_data.py bfcl` fetches. They are looked for in the argument `data_dir`, else in
$SIRA_DATA_DIR/bfcl, else in the cache ($SIRA_CACHE or ~/.cache/sira_jax)/bfcl. The tasks are
defined without the files; only loading needs them.

* `bfcl_simple` (one function), `bfcl_multiple` (the right one of two to four), `bfcl_live_simple`
  (one function, users' own requests); `bfcl` mixes them in proportion to their size. live_multiple
  is left out: its prompts are thousands of tokens long.
* The leaderboard has no training split, so the split is ours, with a fixed seed. Examples that
  share a request or the name of the called function, in whichever file, fall into one split: no
  function called in a test example is called in training.
* Two of the 258 live_simple examples are left out: no call satisfies their answers (an argument
  with an empty list of allowed values).
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sira_jax import json_text
from sira_jax.errors import DataError
from tasks import data_files, reading, specs
from tasks.download import cache_root
from tasks.function_calls import CallAnswers, canonical_call, matches

FILES: Mapping[str, str] = {
    "bfcl_simple": "BFCL_v4_simple_python.json",
    "bfcl_multiple": "BFCL_v4_multiple.json",
    "bfcl_live_simple": "BFCL_v4_live_simple.json",
}
SPLIT_SEED = 0
# Of bfcl-eval 2026.3.23 under SPLIT_SEED; needed before any file is there (listings, mixing rates).
SIZES: Mapping[str, Mapping[str, int]] = {
    "bfcl_simple": {"train": 272, "validation": 56, "test": 72},
    "bfcl_multiple": {"train": 137, "validation": 30, "test": 33},
    "bfcl_live_simple": {"train": 183, "validation": 19, "test": 54},
}
_VALIDATION_SHARE, _TEST_SHARE = 10, 20


@dataclass(frozen=True)
class Record:
    """One line of a data file joined with its answers.

    Attributes:
      id: the leaderboard's id.
      request: the messages' text.
      inputs: the prompt: the schemas on offer, then the request.
      answers: what counts as right.
    """

    id: str
    request: str
    inputs: str
    answers: CallAnswers


def find_data_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder of the data files (see the module's docstring).

    Raises DataError where they are missing.
    """
    root = os.environ.get("SIRA_DATA_DIR")
    if data_dir is not None:
        folder = Path(data_dir)
    else:
        folder = (Path(root) if root else cache_root()) / "bfcl"
    names = [name for file in FILES.values() for name in (file, f"possible_answer/{file}")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"BFCL data file {folder / missing[0]} is missing: "
            "run `python scripts/download_data.py bfcl`, or set SIRA_DATA_DIR"
        )
    for name in names:
        data_files.note("bfcl", name, folder / name)
    return folder


def _read_json_lines(path: Path, fields: Mapping[str, type]) -> Iterator[tuple[int, dict]]:
    """Line numbers and objects. Raises DataError that names the file and every damaged line."""
    rows, damaged = [], []
    for number, line in enumerate(reading.read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json_text.parse(line)
        except ValueError:
            damaged.append(number)
            continue
        if isinstance(row, dict) and all(isinstance(row.get(f), t) for f, t in fields.items()):
            rows.append((number, row))
        else:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        raise DataError(
            f"{path}: {len(damaged)} damaged lines (no JSON object with {list(fields)}): "
            f"lines {shown}; delete the folder and run `python scripts/download_data.py bfcl`"
        )
    if not rows:
        raise DataError(f"{path} is empty: run `python scripts/download_data.py bfcl`")
    yield from rows


def read_file(path: Path) -> list[Record]:
    """The records of a data file, in its order, without those that no call can satisfy.

    Raises:
      DataError: a line is damaged or its answer is missing; the message names file and line.
    """
    answer_path = path.parent / "possible_answer" / path.name
    answers = {
        row["id"]: row["ground_truth"]
        for _, row in _read_json_lines(answer_path, {"id": str, "ground_truth": list})
    }
    records = []
    for number, row in _read_json_lines(path, {"id": str, "question": list, "function": list}):
        try:
            if row["id"] not in answers:
                raise DataError(f"no answer for id {row['id']!r} in {answer_path.name}")
            record = _record(row, answers[row["id"]])
            if matches(canonical_call(record.answers), record.answers):
                records.append(record)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return records


def _record(row: Mapping, ground_truth: Sequence[Mapping]) -> Record:
    try:
        (messages,) = row["question"]
        request = "\n".join(message["content"].strip() for message in messages)
        ((name, allowed),) = ground_truth[0].items()
        (function,) = (f for f in row["function"] if f["name"] == name)
        answers = CallAnswers.from_schema(function, allowed)
        schemas = "\n".join(render_schema(schema) for schema in row["function"])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"unexpected structure ({type(error).__name__}: {error})") from None
    inputs = f"Functions:\n{schemas}\nRequest: {request}\nCall:"
    return Record(row["id"], request, inputs, answers)


def render_schema(function: Mapping, *, descriptions: bool = True) -> str:
    """A function's schema in few tokens: a signature, then one line for each described parameter.

    Args:
      function: the leaderboard's JSON schema of one function.
      descriptions: False leaves out all descriptions.
    """
    properties = function["parameters"]["properties"]
    required = function["parameters"]["required"]
    signature = ", ".join(
        f"{name}{'' if name in required else '?'}: {_type_text(schema)}"
        for name, schema in properties.items()
    )
    lines = [f"{function['name']}({signature})"]
    if descriptions:
        lines[0] += f": {_one_line(function.get('description', ''))}"
        for name, schema in properties.items():
            notes = [_one_line(schema["description"])] if schema.get("description") else []
            if "default" in schema:
                notes.append(f"Default: {schema['default']!r}.")
            if notes:
                lines.append(f"- {name}: {' '.join(notes)}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _type_text(schema: Mapping) -> str:
    kind = schema.get("type", "any")
    if "enum" in schema:
        return f"{kind} in {schema['enum']!r}"
    if "items" in schema:
        return f"{kind}[{_type_text(schema['items'])}]"
    if "properties" in schema:
        fields = (f"{name}: {_type_text(field)}" for name, field in schema["properties"].items())
        return f"{kind}{{{', '.join(fields)}}}"
    return kind


def _groups(records: Sequence[Record]) -> dict[str, str]:
    """Record id -> name of its group: records that share a request or the called function."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for record in records:
        request, function = f"request {record.request}", f"function {record.answers.name}"
        low, high = sorted((find(request), find(function)))
        parent[high] = low
    return {record.id: find(f"function {record.answers.name}") for record in records}


@functools.lru_cache(maxsize=4)
def _load(folder: Path, stamp: tuple[int, ...]) -> dict[str, dict[str, list[specs.Example]]]:
    """Task -> split -> examples. `stamp` only makes a changed file miss the cache."""
    del stamp
    records = {task: read_file(folder / file) for task, file in FILES.items()}
    groups = _groups([record for rows in records.values() for record in rows])
    examples = {task: {split: [] for split in specs.SPLITS} for task in FILES}
    for task, rows in records.items():
        for record in rows:
            key = f"{SPLIT_SEED}\0{groups[record.id]}".encode()
            draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 100
            if draw < _TEST_SHARE:
                split = "test"
            else:
                split = "validation" if draw < _TEST_SHARE + _VALIDATION_SHARE else "train"
            examples[task][split].append(_example(record))
    return examples


def _example(record: Record) -> specs.Example:
    return {
        "inputs": record.inputs,
        "targets": canonical_call(record.answers),
        "answers": record.answers.to_json(),
    }


def load(task: str, split: str, data_dir: str | os.PathLike | None = None) -> list[specs.Example]:
    """The examples of a BFCL task, with the field `answers` for the metric `ast_match`.

    Raises:
      DataError: the files are missing or damaged.
    """
    folder = find_data_dir(data_dir)
    paths = [folder / name for f in FILES.values() for name in (f, f"possible_answer/{f}")]
    stamp = tuple(number for path in paths for number in _stat(path))
    return list(_load(folder.resolve(), stamp)[task][split])


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _register() -> None:
    what = {
        "bfcl_simple": "one function",
        "bfcl_multiple": "the right one of several functions",
        "bfcl_live_simple": "one function, users' own requests",
    }
    for task in FILES:
        specs.add_task(
            specs.TaskSpec(
                name=task,
                description=f"BFCL function call: {what[task]}",
                source=functools.partial(load, task),
                metrics=("exact_match", "ast_match"),
                sizes=SIZES[task],
                extra_fields=("answers",),
            )
        )
    specs.add_mixture(
        specs.MixtureSpec(
            name="bfcl",
            description="all BFCL tasks, in proportion to their size",
            tasks=tuple(FILES),
            rates=tuple(float(SIZES[task]["train"]) for task in FILES),
        )
    )


_register()
