"""Finds and reads data files: where they are, damaged rows, and a validation split where upstream has none.

Files of a data set are in DATA/<folder of the set>; DATA is $SIRA_DATA_DIR (scripts set it from --data_dir), else the
cache ($SIRA_CACHE or ~/.cache/sira_jax).

A damaged row is left out, counted, and named with its line in a warning; where more than a share of a file's rows are
damaged (1 %, or $SIRA_MAX_DAMAGED), reading it fails instead.
"""

import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sira_jax import files, json_text
from sira_jax.errors import DataError
from tasks import data_files
from tasks.download import cache_root
from tasks.specs import Example

Row = TypeVar("Row")
MAX_DAMAGED = 0.01
_SHOWN = 10
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
# What network file systems answer while a server comes back.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


class DamagedRowsWarning(UserWarning):
    """Rows of a data file were left out."""


def data_root() -> Path:
    """$SIRA_DATA_DIR, else the cache."""
    root = os.environ.get("SIRA_DATA_DIR")
    return Path(root).expanduser() if root else cache_root()


def data_file(folder: str, name: str, *, source: str | None = None) -> Path:
    """The path of a data file below `data_root()`.

    Args:
      folder: of the data set.
      name: of the file, relative to it.
      source: what scripts/download_data.py calls the data set; default the folder.

    Raises DataError where it is missing.
    """
    path = data_root() / folder / name
    if not path.is_file():
        raise DataError(
            f"data file {path} is missing: run `python scripts/download_data.py {source or folder}`,"
            " or set SIRA_DATA_DIR (--data_dir) to the folder that holds it"
        )
    data_files.note(folder, name, path)
    return path


def read_bytes(path: Path) -> bytes:
    """The content of a file, in a few attempts where a network file system fails. Raises DataError where it cannot be read."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return files.read_bytes(path)
        except OSError as error:
            if error.errno not in _PASSING:
                raise DataError(f"{path}: {error.strerror}") from None
            reason = error.strerror
        if attempt < _ATTEMPTS:
            time.sleep(_PAUSE_SECONDS * attempt)
    raise DataError(f"{path}: {reason}, in {_ATTEMPTS} attempts")


def max_damaged() -> float:
    """The share of a file's rows that may be damaged. Raises DataError for a bad $SIRA_MAX_DAMAGED."""
    text = os.environ.get("SIRA_MAX_DAMAGED")
    if not text:
        return MAX_DAMAGED
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise DataError(f"SIRA_MAX_DAMAGED={text!r} is not allowed: a share from 0 to 1")
    return share


def parse_rows(
    path: Path,
    rows: Iterable[tuple[int, Row]],
    parse: Callable[[Row], Example | None],
    *,
    unit: str = "line",
    number_unit: str | None = None,
) -> list[Example]:
    """The examples of the rows that can be read.

    Args:
      path: of the file, for messages.
      rows: numbers, as an editor or a list counts them, and rows.
      parse: makes an example of a row, or None for a sound row that is no example. Raises DataError for a damaged one.
      unit: what the rows are called.
      number_unit: what the numbers count, where that is something else.

    Raises:
      DataError: there is no example, or more rows are damaged than `max_damaged` allows; the message names the rows.
    """
    examples: list[Example] = []
    damaged: list[tuple[int, str]] = []
    total = 0
    for number, row in rows:
        total += 1
        try:
            example = parse(row)
        except DataError as error:
            damaged.append((number, str(error)))
            continue
        if example is not None:
            examples.append(example)
    if damaged:
        numbers = ", ".join(str(number) for number, _ in damaged[:_SHOWN])
        more = ", ..." if len(damaged) > _SHOWN else ""
        plural = "s" if len(damaged) > 1 else ""
        named = number_unit or unit
        message = (
            f"{path}: {len(damaged)} of {total} {unit}s damaged: {named}{plural} {numbers}{more}"
            f" ({named} {damaged[0][0]}: {damaged[0][1]})"
        )
        if len(damaged) > max_damaged() * total:
            raise DataError(
                f"{message}; at most {max_damaged():.2%} may be (SIRA_MAX_DAMAGED is the share)"
            )
        warnings.warn(f"{message}; left out", DamagedRowsWarning, stacklevel=2)
    if not examples:
        raise DataError(f"{path} holds no examples ({total} {unit}s)")
    return examples


def read_text(path: Path, *, fallback: str | None = None, by_row: bool = False) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Args:
      path: of the file.
      fallback: an encoding for files that are not UTF-8; None allows none.
      by_row: leave bytes that are not UTF-8 to `check_utf8`, so that they damage a row and not the file.

    Raises DataError where it cannot be read.
    """
    data = read_bytes(path)
    if by_row:
        return data.decode("utf-8-sig", errors="surrogateescape")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback is None:
            line = data.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason})") from None
        return data.decode(fallback)


def check_utf8(text: str) -> None:
    """Raises DataError where a part of `read_text(..., by_row=True)` was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("not UTF-8") from None


def read_json_lines(path: Path, parse: Callable[[Mapping], Example | None]) -> list[Example]:
    """The examples of a file of one JSON object a line; empty lines are none. Raises as `parse_rows`."""

    def parse_line(line: bytes) -> Example | None:
        try:
            row = json_text.parse(line.decode("utf-8-sig"))
        except ValueError as error:
            raise DataError(f"no JSON ({error})") from None
        return parse(_object(row))

    # Not splitlines: U+2028 and its like may stand inside a JSON text.
    lines = read_bytes(path).split(b"\n")
    rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return parse_rows(path, rows, parse_line)


def read_json(path: Path, *, fallback: str | None = None) -> object:
    """The value of a JSON file. Raises DataError that names the line where it is none."""
    text = read_text(path, fallback=fallback)
    try:
        return json_text.parse(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: no JSON ({error.msg})") from None
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error})") from None


def read_json_list(path: Path, parse: Callable[[Mapping], Example | None]) -> list[Example]:
    """The examples of a JSON list of objects, numbered from 1. Raises as `parse_rows` and `read_json`."""
    items = read_json(path)
    if not isinstance(items, list):
        raise DataError(f"{path}: a {type(items).__name__} where a JSON list should be")
    return parse_rows(
        path, enumerate(items, start=1), lambda item: parse(_object(item)), unit="item"
    )


def _object(value: object) -> Mapping:
    if not isinstance(value, dict):
        raise DataError("no JSON object")
    return value


def text_of(row: Mapping, *names: str) -> str:
    """The text `row[a][b]...`. Raises DataError where there is none, or it is blank."""
    value = value_of(row, str, *names)
    if not value.strip():
        raise DataError(f"{'.'.join(names)} is empty")
    return value


def value_of(row: Mapping, kind: type, *names: str) -> object:
    """The value `row[a][b]...` of type `kind`. Raises DataError where there is none."""
    value: object = row
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    # JSON's true and false are no numbers.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{'.'.join(names)} is no {kind.__name__}")
    return value


def carve(examples: Sequence[Example], split: str, *, share: int, name: str) -> list[Example]:
    """Splits upstream's training file into "train" and "validation".

    Which one an example falls into is a hash of its input: equal inputs fall into one split, on every machine.

    Args:
      examples: of the file.
      split: which part to return.
      share: per cent of the examples that are validation.
      name: of the data set; another name is another split.
    """

    def is_validation(example: Example) -> bool:
        key = f"{name}\0{example['inputs']}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return int.from_bytes(digest, "big") % 100 < share

    return [e for e in examples if is_validation(e) == (split == "validation")]
