"""What the readers of model files say of one that cannot be opened."""

import contextlib
import os
from collections.abc import Iterator

from sira_jax.errors import ModelFileError


@contextlib.contextmanager
def opening(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError of opening or reading into a ModelFileError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ModelFileError(f"{os.fspath(path)}: no such file") from None
    except OSError as error:
        raise ModelFileError(f"{os.fspath(path)}: cannot be opened ({error.strerror})") from None
