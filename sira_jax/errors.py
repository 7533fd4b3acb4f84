"""Errors that are the user's to mend: each carries one line that names the field or file, the value and what is allowed.

Scripts print that line and exit with status 2 (see `scripts/cli.py`); any other exception is a defect of ours and keeps its
stack trace.
"""

_LARGEST_FLOAT32 = 3.4028234663852886e38
LONGEST_MESSAGE = 1000  # characters; of a longer one the middle is left out


class SiraError(Exception):
    """Base class of every error a user can cause and mend.

    The message is one line of printable text whatever the file or the value that it shows holds.
    """

    def __init__(self, message: object = ""):
        super().__init__(_one_line(str(message)))


def _one_line(text: str) -> str:
    """Line ends become spaces, other characters that cannot be printed their escapes."""
    text = _shortened(text)
    if text.isprintable():
        return text
    spaced = " ".join(text.splitlines())
    return _shortened("".join(c if c.isprintable() else ascii(c)[1:-1] for c in spaced))


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_MESSAGE:
        return text
    part = LONGEST_MESSAGE // 2 - 10
    return f"{text[:part]} [...] {text[-part:]}"


class ConfigError(SiraError, ValueError):
    """A field of a config is unknown, out of range or contradicts another."""


class DataError(SiraError, ValueError):
    """A data file or a task is missing, damaged or empty."""


class ModelFileError(SiraError, ValueError):
    """A model file is missing, truncated, or its tensors do not fit the model."""


class CheckpointError(SiraError, ValueError):
    """A checkpoint is missing, incomplete, or belongs to another base model or config."""


class StorageError(SiraError, OSError):
    """A file cannot be written or read: no room, no right, or a device that fails."""


class LockedError(SiraError, RuntimeError):
    """Another run works in the run directory."""


class TrainingError(SiraError, RuntimeError):
    """Training cannot go on, for example after a loss that is not a number."""


class DependencyError(SiraError, ImportError):
    """An optional library is missing or of a version that cannot be used."""


class MergeError(SiraError, ValueError):
    """The adapter has no equal plain kernel, so it cannot be merged."""


def is_whole_number(value: object) -> bool:
    """Whether a field holds an integer; True and False, which Python counts among them, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Whether a field holds a number that is neither infinite nor NaN, and stays so in float32, in which it is used."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST_FLOAT32


def check(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises ConfigError naming `field`, `value` and what is `allowed`, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r} is not allowed: {allowed}")
