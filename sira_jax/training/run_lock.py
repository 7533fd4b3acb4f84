"""One run at a time in a run directory.

The lock is the kernel's (flock), so that it goes with its process, however that ends: none is ever stale. On NFS Linux
makes it a lock of the server, which all machines see, and which the server takes back from a machine that is gone (NFSv4:
after its lease, 90 seconds by default). Buckets mounted as folders (FUSE) and NFS mounted with local locks keep it to one
machine, so that runs on two do not notice each other. Of several processes, process 0 holds it.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sira_jax.errors import LockedError
from sira_jax.files import naming

LOCK_FILE = "run.lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
# Of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(directory: str | os.PathLike, patience: float = 0.0) -> Iterator[None]:
    """Holds the lock of a run directory, which is made if it is missing, while the body runs.

    Where the file system has no locks, a line on standard error says so and the body runs without.

    Args:
      directory: the run directory.
      patience: seconds to wait for another run to end.

    Raises:
      LockedError: another run holds it; says which.
    """
    path = Path(directory) / LOCK_FILE
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # For writing too, which NFS wants of the holder of an exclusive lock. Never removed: a new file of that name would
        # be another lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _lock(descriptor, path, patience):
            _note(descriptor)
        yield
    finally:
        # Closing gives the lock back.
        os.close(descriptor)


def _lock(descriptor: int, path: Path, patience: float) -> bool:
    """Whether the lock is held now; False where there are none."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(
                    f"warning: {path}: the file system has no locks ({error.strerror}): see to it that no second run"
                    f" works in {path.parent}",
                    file=sys.stderr,
                )
                return False
            if error.errno not in _HELD:
                raise
        if time.monotonic() >= deadline:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            raise LockedError(
                f"{path.parent}: another run works here ({holder or 'it has not said which'}): wait for its end, stop it, or"
                " use another --workdir"
            )
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))


def _note(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
    # On a full disk the lock holds all the same.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
