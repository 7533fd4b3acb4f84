"""Which data files the tasks of a run were read from, so that a resumed run notices when one is another."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from sira_jax.errors import DataError

_recorders: list[dict[str, Path]] = []


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Path]]:
    """Name -> path of each data file that is asked for while the body runs, also where its content is in memory already."""
    files: dict[str, Path] = {}
    _recorders.append(files)
    try:
        yield files
    finally:
        _recorders.remove(files)


def note(folder: str, name: str, path: Path) -> None:
    """Says that a data set's file is used; its name is the same wherever the data folder lies."""
    for files in _recorders:
        files[f"{folder}/{name}"] = path


def fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    """Name -> SHA-256 of the content; raises DataError where a file cannot be read."""
    sums = {}
    for name, path in sorted(files.items()):
        try:
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
    return sums
