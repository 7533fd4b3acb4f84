"""Opening files that others name, and writing files so that a reader, or a run that was killed, never finds half of one."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sira_jax.errors import ConfigError, StorageError

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
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error


def make_directory(path: str | os.PathLike, what: str) -> None:
    """Makes a directory with its parents, if it is missing.

    Raises:
      ConfigError: it cannot be one, because a file stands there or on the way; the message begins with `what`.
      StorageError: the device is full or fails.
    """
    try:
        with naming(path):
            os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{what}: is not a directory, or lies in none") from None


def open_binary(path: str | os.PathLike, buffering: int = -1) -> BinaryIO:
    """Opens a regular file for reading; links to one are followed.

    Pipes would wait for a writer and devices may never end.

    Raises:
      OSError: with `strerror`, if it cannot be opened, its name is none that a file can have, or it is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or half of a pair of surrogates
        raise OSError(errno.EINVAL, f"no file can have this name: {error}", path) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "no regular file", path)
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file; raises as `open_binary`."""
    with open_binary(path) as file:
        return file.read()


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
