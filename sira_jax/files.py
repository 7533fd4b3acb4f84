"""Writing files so that a reader, or a run that was killed, never finds half of one."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sira_jax.errors import StorageError

# What a user mends without touching the program: room, rights and devices.
STORAGE_ERRORS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EIO,
        errno.ESTALE,
        errno.EACCES,
    )
)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turns a full or failing device into a StorageError that names the file; other errors pass."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a new binary file beside `path`, then moves that file to `path` in one step.

    Raises StorageError where there is no room or the device fails; `path` is then as it was.
    """
    with naming(path):
        _write_atomically(path, write)


def _write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_text(path: str | os.PathLike | Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))
