"""Training checkpoints through Orbax: the adapter, optimizer state, step, data position and config, never the base model.

The base is named by its fingerprint instead. Saving is asynchronous; a checkpoint exists only once it is whole, since Orbax
writes to a temporary name and renames.
"""

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sira_jax.checkpoints import checksums
from sira_jax.checkpoints.sealed_path import SealedPath
from sira_jax.errors import CheckpointError, StorageError
from sira_jax.files import STORAGE_ERRORS

_MANAGER = ocp.checkpoint_managers
# Old checkpoints are moved here before they are removed, so that a kill never leaves half of one under a step's name.
TRASH = "deleted"


@dataclasses.dataclass
class _NewestMultiple(_MANAGER.PreservationPolicy):
    """Keeps the newest checkpoint whose step is a multiple of `period`."""

    period: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [info.step for info in checkpoints if info.step % self.period == 0]
        return [info.step == max(steps, default=None) for info in checkpoints]


def whole_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that have their final names, ascending, from the folder itself."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


class Checkpointer:
    """The checkpoints of one run directory.

    Args:
      directory: where they are; made if missing.
      keep: newest checkpoints kept.
      best_metric: name in the `metrics` given to `save` whose best checkpoint is kept besides; "" for none.
      best_mode: "min" or "max".
      keep_multiple: the newest checkpoint whose step is a multiple of it is kept besides; 0 for none.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        best_metric: str = "",
        best_mode: str = "min",
        keep_multiple: int = 0,
    ):
        self.directory = Path(directory).absolute()
        self._emptying: threading.Thread | None = None
        _silence_saving_thread()
        _ignore_late_callbacks()
        self._best_metric = best_metric
        sign = 1.0 if best_mode == "max" else -1.0
        policies = [_MANAGER.LatestN(keep)]
        if keep_multiple:
            policies.append(_NewestMultiple(keep_multiple))
        best_fn = None
        if best_metric:

            def best_fn(metrics):
                return sign * metrics[best_metric]

            # A step saved without an evaluation has no metrics and is never the best.
            policies.append(
                _MANAGER.BestN(n=1, get_metric_fn=best_fn, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_MANAGER.AnyPreservationPolicy(policies),
            best_fn=best_fn,
            enable_async_checkpointing=True,
            temporary_path_class=SealedPath,
            todelete_subdir=TRASH,
            create=True,
        )
        handlers = {
            "adapter": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        try:
            # Reads the metrics of all checkpoints, any of which may be damaged.
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
        except (OSError, ValueError) as error:
            self._raise_storage(error)
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{self.directory}: cannot be read: {reason}") from error

    def save(
        self,
        step: int,
        adapter: Any,
        optimizer: Any,
        data: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied to the host. Does nothing if `step` is saved already.

        Args:
          step: optimizer steps done.
          adapter: the trained parameters, sharded or not.
          optimizer: the rest of what a step updates; apart, since evaluation reads only the adapter.
          data: position of the input pipeline, plain JSON data.
          meta: config and base fingerprint, plain JSON data.
          metrics: the evaluation at this step, if there was one.

        Raises:
          StorageError: this checkpoint, or the one before it, of which it is known only now, could not be written; names the
            last good one.
        """
        if step in self._manager.all_steps():
            return
        if metrics is not None and not math.isfinite(metrics.get(self._best_metric, math.nan)):
            # What is no number would be kept as the best.
            metrics = None
        self._empty_trash()
        with self._storage_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    adapter=ocp.args.StandardSave(adapter),
                    optimizer=ocp.args.StandardSave(optimizer),
                    data=ocp.args.JsonSave(dict(data)),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
                metrics=dict(metrics) if metrics is not None else None,
                force=True,
            )

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which were given up."""
        for later in self.all_steps():
            if later > step:
                self._manager.delete(later)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step that is best by the metric; None without a metric or an evaluated checkpoint."""
        if not self._best_metric:
            return None
        return self._manager.best_step()

    def all_steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """Directory of one checkpoint."""
        return self.directory / str(step)

    def check(self, step: int, parts: Sequence[str] | None = None) -> None:
        """Raises CheckpointError, naming the file, if a checkpoint's files are not what was saved.

        Args:
          step: one of `all_steps`.
          parts: which of "adapter", "optimizer", "data", "meta" matter; None for all that is there.
        """
        problem = checksums.problem(self.path(step), parts)
        if problem:
            raise CheckpointError(f"{self.path(step)}: is damaged: {problem}{self._others(step)}")

    def _others(self, step: int) -> str:
        others = [other for other in self.all_steps() if other != step]
        return f"; there are also {', '.join(map(str, others))}" if others else ""

    def restore(self, step: int, adapter: Any, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Returns (adapter, optimizer, data) of a checkpoint.

        Args:
          step: one of `all_steps`.
          adapter: tree of jax.ShapeDtypeStruct, with the shardings that the arrays shall have; they need not be the
            shardings they were saved with.
          optimizer: the same.

        Raises:
          CheckpointError: if the checkpoint is damaged or its trees do not fit.
        """
        args = ocp.args.Composite(
            adapter=ocp.args.StandardRestore(adapter),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=ocp.args.JsonRestore(),
        )
        restored = self._restore(step, args)
        return restored.adapter, restored.optimizer, restored.data

    def restore_adapter(self, step: int, adapter: Any) -> Any:
        """Returns the trained parameters alone; see `restore`."""
        args = ocp.args.Composite(adapter=ocp.args.StandardRestore(adapter))
        return self._restore(step, args).adapter

    def restore_meta(self, step: int) -> dict[str, Any]:
        """Returns `meta` of a checkpoint; raises CheckpointError if it cannot be read or lacks a field."""
        meta = self._restore(step, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        for field, kind in (("config", Mapping), ("base_fingerprint", str)):
            if not isinstance(meta, Mapping) or not isinstance(meta.get(field), kind):
                raise CheckpointError(f"{self.path(step)}: cannot be restored: meta has no {field}")
        return meta

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:
            # Where an array cannot be read, Orbax raises Exception itself from the error that says why.
            if type(error) is not Exception and not isinstance(
                error, OSError | ValueError | KeyError | TypeError
            ):
                raise
            cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
            reason = str(cause).strip().split("\n")[0][:300]
            raise CheckpointError(f"{self.path(step)}: cannot be restored: {reason}") from error

    def wait(self) -> None:
        """Returns once every save that was started is whole on disk; raises StorageError as `save`."""
        with self._storage_errors():
            self._manager.wait_until_finished()
        self._join_emptying()
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)

    def _empty_trash(self) -> None:
        """Starts removing what lies in the trash, for which a network file system takes its time."""
        self._join_emptying()
        trash = self.directory / TRASH
        if jax.process_index() == 0 and trash.is_dir():
            # The folder itself stays, since Orbax may be about to move something there.
            old = list(trash.iterdir())
            self._emptying = threading.Thread(
                target=lambda: [shutil.rmtree(folder, ignore_errors=True) for folder in old]
            )
            self._emptying.start()

    def _join_emptying(self) -> None:
        if self._emptying is not None:
            self._emptying.join()
            self._emptying = None

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._raise_storage(error)
            raise

    def _raise_storage(self, error: Exception) -> None:
        """Raises StorageError from what a full or failing device led to; returns where it is something else."""
        # TensorStore has the number in the text of a ValueError alone.
        numbers = re.findall(r"os_error_code='(\d+)'", str(error))
        number = int(numbers[-1]) if numbers else getattr(error, "errno", None)
        if number not in STORAGE_ERRORS:
            return
        steps = whole_steps(self.directory)
        good = f"the last good one is {self.path(steps[-1])}" if steps else "there is no good one"
        raise StorageError(
            f"{self.directory}: a checkpoint cannot be written: {os.strerror(number)}; {good}, and the same command goes on"
            " from it"
        ) from error

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.close()


class _RaisedAnyway(logging.Filter):
    """Leaves out the stack traces that Orbax, and asyncio for its writes, log of an error in a saving thread.

    Orbax raises the first such error in the main thread too.
    """

    _TEXTS = (
        "exception was never retrieved",
        "background save thread",
        "Finalize thread (%s) failed",
        "raised an exception",
        "Failed to write metadata",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in self._TEXTS)


def _silence_saving_thread() -> None:
    for logger in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        if not any(isinstance(known, _RaisedAnyway) for known in logger.filters):
            logger.addFilter(_RaisedAnyway())


def _ignore_late_callbacks() -> None:
    """Keeps reads and writes that outlive a failure from writing stack traces to standard error, from here on.

    They report to an event loop that Orbax has closed by then, or are broken off; what failed has raised its own error.
    """
    previous = sys.unraisablehook
    if getattr(previous, "ignores_late_callbacks", False):
        return

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        is_broken_off = code is not None and "orbax" in code.co_filename
        if not is_broken_off and str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    hook.ignores_late_callbacks = True
    sys.unraisablehook = hook
