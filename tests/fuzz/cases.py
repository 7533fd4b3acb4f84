"""One case: a sound folder is damaged, read, and what happens is judged."""

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from sira_jax.errors import SiraError
from tasks.reading import DamagedRowsWarning
from tests.fuzz.formats import mutation_of
from tests.fuzz.mutations import change_entry
from tests.fuzz.targets import Target

SECONDS = 10.0  # of a case, in CPU time
CONSTANT_BYTES, BYTES_PER_BYTE = (
    48 << 20,
    64,
)  # a case may take the first, and so many times the size of its files
LONGEST_MESSAGE = 1000


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
      kind: "loaded", "refused", or "finding".
      change: what was done to the files.
      detail: the message of a refusal, or what is wrong.
      seconds: CPU time.
      peak_bytes: most memory held beyond what was held before.
    """

    kind: str
    change: str
    detail: str
    seconds: float
    peak_bytes: int


class _Hang(BaseException):
    """The case took too long. No Exception, so that nothing swallows it."""


def seed_folders(target: Target, root: Path) -> list[Path]:
    """The sound folders of a format, made below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    target.make(root)
    return sorted(path for path in root.iterdir())


def damage(rng: random.Random, sound: Path, copy: Path) -> str:
    """Copies a sound folder and changes one or two of its files; returns what was changed."""
    shutil.copytree(sound, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(files)
        if path.is_symlink() or not path.is_file():
            continue
        if rng.randrange(20) == 0:
            done.append(f"{path.name}: {change_entry(rng, path, copy)}")
        else:
            data = mutation_of(path)(rng, path.read_bytes())
            path.write_bytes(data)
            done.append(f"{path.name}: {len(data)} bytes")
    return "; ".join(done)


def run_case(target: Target, sound: list[Path], seed: int, scratch: Path) -> Outcome:
    """Damages and reads; leaves nothing behind.

    Args:
      target: the format.
      sound: its `seed_folders`.
      seed: of the damage.
      scratch: a folder that the case may fill.
    """
    rng = random.Random(seed)
    source = rng.choice(sound)
    folder = scratch / source.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    change = f"{source.name}: {damage(rng, source, folder)}"
    size = sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    before = _reset_peak()
    started = time.process_time()
    kind, detail = _judge(target, folder)
    seconds, peak = time.process_time() - started, max(0, _peak() - before)
    limit = CONSTANT_BYTES + BYTES_PER_BYTE * size
    if kind != "finding" and peak > limit:
        kind, detail = "finding", f"{peak >> 20} MiB were held for files of {size} bytes ({detail})"
    shutil.rmtree(scratch, ignore_errors=True)
    return Outcome(kind, change, detail, seconds, peak)


def _judge(target: Target, folder: Path) -> tuple[str, str]:
    def too_long(*_):
        raise _Hang

    previous = signal.signal(signal.SIGVTALRM, too_long), signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS)  # what waits uses no CPU
    try:
        with warnings.catch_warnings():
            # A warning on standard error would be a second message.
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DamagedRowsWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            target.load(folder)
    except SiraError as error:
        return _judge_message(str(error), folder, target.names_file)
    except _Hang:
        return "finding", f"took more than {SECONDS:g} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a loader lets out is what is looked for
        return "finding", _where(error)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGVTALRM, previous[0])
        signal.signal(signal.SIGALRM, previous[1])
    return "loaded", ""


def _judge_message(message: str, folder: Path, names_file: bool) -> tuple[str, str]:
    if not message.isprintable():
        return "finding", f"the message is not one line of printable text: {message[:200]!r}"
    if len(message) > LONGEST_MESSAGE:
        return "finding", f"the message has {len(message)} characters: {message[:200]!r}"
    # Where damage leaves a file with too few examples for a split, the task is what is named.
    if names_file and str(folder) not in message and " of task " not in message:
        return "finding", f"the message names no file: {message!r}"
    return "refused", message


def _where(error: BaseException) -> str:
    """The error and the last lines of the project in its stack."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).parents[2])
    own = [
        f"{frame.filename.removeprefix(root + '/')}:{frame.lineno}"
        for frame in frames
        if frame.filename.startswith(root) and ".venv" not in frame.filename
    ]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]} at {' < '.join(reversed(own[-3:]))}"


def _reset_peak() -> int:
    """Makes `_peak` count from here; returns the bytes held now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # no such file, or no right: the peak is then that of the whole process
        pass
    return _peak()


def _peak() -> int:
    """Most bytes held since `_reset_peak`."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) << 10
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


@contextlib.contextmanager
def limited_memory(extra_bytes: int) -> Iterator[None]:
    """Lets this process take only so much address space more than it has, so that a huge allocation fails at once."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
