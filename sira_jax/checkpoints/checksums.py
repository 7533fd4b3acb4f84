"""SHA-256 of every file of a folder, written into it before it gets its final name, and compared when it is read.

Orbax's own files carry too little: chunks of arrays are compressed without a checksum, and JSON has none.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sira_jax.files import write_text

CHECKSUMS = "checksums.json"


def write(folder: Path) -> None:
    """Writes CHECKSUMS of what is in a folder; to be called when nothing else is written into it."""
    sums = {str(path.relative_to(folder)): _sha256(path) for path in sorted(_files(folder))}
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=0) + "\n")


def problem(folder: Path, parts: Iterable[str] | None = None) -> str | None:
    """What is wrong with a folder, in a few words that name the file; None where nothing is, or it has no CHECKSUMS.

    Args:
      folder: of `write`.
      parts: names of the folders in it that matter; None for all of it.

    Raises:
      PermissionError: a file may not be read, which says nothing about its content.
    """
    try:
        text = (folder / CHECKSUMS).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return _unreadable(CHECKSUMS, error)
    try:
        sums = dict(json.loads(text))
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is damaged"
    wanted = None if parts is None else set(parts)
    for name, expected in sums.items():
        if wanted is not None and Path(name).parts[0] not in wanted:
            continue
        try:
            found = _sha256(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return _unreadable(name, error)
        if found != expected:
            return f"{name} has changed since it was written"
    return None


def _unreadable(name: str, error: Exception) -> str:
    if isinstance(error, PermissionError):
        raise error
    return f"{name} cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
