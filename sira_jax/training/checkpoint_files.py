"""What a run does with the folder of its checkpoints before it goes on from one: looks whether the newest is sound."""

import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import path as ocp_path

from sira_jax.checkpoints import checksums
from sira_jax.checkpoints.orbax import TRASH, whole_steps
from sira_jax.errors import CheckpointError
from sira_jax.training import multihost

DAMAGED = ".damaged"
_READ_OF_ALL = ("metrics", "_CHECKPOINT_METADATA")
_TEMPORARY = ocp_path.atomicity_types.TMP_DIR_SUFFIX


def prepare(directory: Path) -> None:
    """Makes the newest checkpoint left in a folder a sound one; every process calls this, and process 0 acts.

    A checkpoint whose files are not what was saved is renamed to STEP.damaged, with a line on standard error; what a
    kill left of an unfinished save or removal is removed.

    Raises:
      CheckpointError: a file may not be read, or not one of the checkpoints is sound.
    """
    if multihost.is_main():
        _prepare(Path(directory))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("sira_jax checkpoints looked at")


def _prepare(directory: Path) -> None:
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if (_TEMPORARY in path.name or path.name == TRASH) and path.is_dir():
            shutil.rmtree(path)
    steps = whole_steps(directory)
    damaged: list[tuple[Path, str]] = []
    newest = None
    for step in reversed(steps):
        folder = directory / str(step)
        # Of older ones only what is read of all.
        problem = _problem(folder, None if newest is None else _READ_OF_ALL)
        if problem is not None:
            damaged.append((folder, problem))
        elif newest is None:
            newest = step
    if steps and newest is None:
        folder, problem = damaged[0]
        raise CheckpointError(
            f"{directory}: all checkpoints are damaged ({folder.name}: {problem}); move the folder away to start from the"
            " beginning"
        )
    for folder, problem in damaged:
        name = set_aside(folder).name
        print(
            f"warning: {folder} is damaged: {problem}; it is {name} now, and the run goes on from {newest}",
            file=sys.stderr,
        )


def newest_sound(directory: Path, period: int) -> int:
    """Step of the newest sound checkpoint at a multiple of `period`, 0 without one; every process calls this.

    Damaged ones are passed over, with a line on standard error.

    Raises:
      CheckpointError: a file may not be read.
    """
    step = _newest_sound(directory, period) if multihost.is_main() else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def _newest_sound(directory: Path, period: int) -> int:
    for step in reversed(whole_steps(directory)):
        if step % period == 0:
            problem = _problem(directory / str(step), None)
            if problem is None:
                return step
            print(f"warning: {directory / str(step)} is damaged: {problem}", file=sys.stderr)
    return 0


def _problem(folder: Path, parts: tuple[str, ...] | None) -> str | None:
    try:
        return checksums.problem(folder, parts)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None


def set_aside(folder: Path) -> Path:
    """Renames a checkpoint to one that nothing reads, and returns the new path."""
    number = 0
    while True:
        name = folder.with_name(f"{folder.name}{DAMAGED}{number or ''}")
        if not name.exists():
            os.rename(folder, name)
            return name
        number += 1
