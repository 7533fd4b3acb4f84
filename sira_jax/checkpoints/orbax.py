"""Training checkpoints through Orbax: the adapter, optimizer state, step, data position and config, never the base model.

The base is named by its fingerprint instead. Saving is asynchronous; a checkpoint exists only once it is whole, since Orbax
writes to a temporary name and renames.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from sira_jax.errors import CheckpointError

_MANAGER = ocp.checkpoint_managers


class Checkpointer:
    """The checkpoints of one run directory.

    Args:
      directory: where they are; made if missing.
      keep: newest checkpoints kept.
      best_metric: name in the `metrics` given to `save` whose best checkpoint is kept besides; "" for none.
      best_mode: "min" or "max".
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, best_metric: str = "", best_mode: str = "min"
    ):
        self.directory = Path(directory).absolute()
        self._best_metric = best_metric
        sign = 1.0 if best_mode == "max" else -1.0
        policies = [_MANAGER.LatestN(keep)]
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
        """
        if step in self._manager.all_steps():
            return
        if metrics is not None and not math.isfinite(metrics.get(self._best_metric, math.nan)):
            # What is no number would be kept as the best.
            metrics = None
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
            with _late_reads_ignored():
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
        """Returns once every save that was started is whole on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.close()


@contextlib.contextmanager
def _late_reads_ignored() -> Iterator[None]:
    """Keeps reads that outlive a failed restore from writing stack traces to standard error.

    They report to an event loop that Orbax has closed by then, or are broken off; the restore has raised its own error. The
    hook stays after a failure, since such reads may end at any time.
    """
    previous = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        is_broken_off = code is not None and "orbax" in code.co_filename
        if not is_broken_off and str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = previous
