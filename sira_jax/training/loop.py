"""The training loop: steps, logs, evaluations, checkpoints; it can be stopped at any moment and resumed to the same result."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters import split_trained
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.checkpoints.orbax import Checkpointer
from sira_jax.errors import CheckpointError, ConfigError, TrainingError
from sira_jax.files import write_text
from sira_jax.models import Model
from sira_jax.training import multihost, partitioning
from sira_jax.training.config import ExperimentConfig, make_experiment
from sira_jax.training.logging import MetricsLog, Progress, SilentLog
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import (
    TrainState,
    abstract_adapter,
    init_adapter,
)
from sira_jax.training.train_step import make_train_step

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"

# Fields that a resumed run may change: they steer how long and how often, not what a step computes.
_MAY_CHANGE = {
    "train": {"log_every", "eval_every", "checkpoint_every", "keep_checkpoints"},
    "mesh": None,
    "decode": None,
    "evaluate": None,
    "model": {"path", "remat_policy"},
    "adapter": {"dispatch"},
}


class BatchSource(Protocol):
    """An endless source of batches that can be put back to any earlier position."""

    def next_batch(self) -> dict[str, np.ndarray]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


# The parameters' norm is of the updated ones: a step that breaks them is found before they are saved.
_MUST_BE_FINITE = ("loss", "gradient_norm", "auxiliary_loss", "parameter_norm")

Evaluator = Callable[[Any], Mapping[str, float]]


def make_checkpointer(workdir: Path, experiment: ExperimentConfig) -> Checkpointer:
    """The checkpoints of a run directory."""
    train = experiment.train
    return Checkpointer(
        Path(workdir) / CHECKPOINTS,
        keep=train.keep_checkpoints,
        best_metric=train.keep_best,
        best_mode=train.best_mode,
    )


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointError, naming the field, if a run directory was made by another config."""
    _check_same(saved, current, where, _MAY_CHANGE)


def check_adapter(saved: Mapping[str, Any], experiment: ExperimentConfig, where: Path) -> None:
    """Raises CheckpointError, naming the field, if a checkpoint's adapter computes something else than the config's."""
    may_change = dict.fromkeys(_MAY_CHANGE | saved)
    if experiment.adapter is not None:
        may_change["adapter"] = set(experiment.adapter.training_fields)
    _check_same(saved, experiment.to_dict(), where, may_change)


def _check_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    where: Path,
    allowed: Mapping[str, set[str] | None],
) -> None:
    """`allowed`: section -> fields that may differ, None for all."""
    # Through JSON, so that tuples and lists compare equal.
    current = json.loads(json.dumps(current))
    try:
        # Read and written again: a field that did not exist yet has its default.
        saved = json.loads(json.dumps(make_experiment(saved).to_dict()))
    except ConfigError as error:
        raise CheckpointError(f"{where}: its config is of another version: {error}") from None
    for section in sorted(set(saved) | set(current)):
        may_change = allowed.get(section, set())
        if may_change is None:
            continue
        old, new = saved.get(section, {}), current.get(section, {})
        for field in sorted((set(old) | set(new)) - may_change):
            if old.get(field) != new.get(field):
                raise CheckpointError(
                    f"{where}: was started with {section}.{field}={old.get(field)!r}, the config has"
                    f" {new.get(field)!r}: use another --workdir, or the old value"
                )


class _StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a flag, so that the step under way ends and is saved."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self):
        self._previous = {}
        # Only the main thread may set handlers; elsewhere (some test runners) the flag just stays unset.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *unused):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run: holds the compiled step, the state, the data position and the checkpoints.

    Args:
      experiment: the config.
      model: decoder with the adapter to train.
      frozen: parameters of the base, placed on the mesh.
      data: batches, this process's rows of each (`BatchLayout.rows`); restored together with the state.
      workdir: run directory; made if missing.
      mesh: devices.
      evaluate: called with the adapter's parameters at every evaluation, returns metrics by name.
      task_names: names of the tasks that the batches' task ids stand for, for per-task router metrics.
      tensorboard: write TensorBoard files.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        model: Model,
        frozen: Any,
        data: BatchSource,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        evaluate: Evaluator | None = None,
        task_names: Sequence[str] = (),
        tensorboard: bool = True,
    ):
        train = experiment.train
        self._experiment, self._model, self._frozen = experiment, model, frozen
        self._data, self._mesh, self._evaluate = data, mesh, evaluate
        self._workdir = Path(workdir)
        self._tensorboard = tensorboard
        self._rules = partitioning.make_rules(experiment.mesh)
        self._layout = partitioning.BatchLayout(mesh, experiment.data.batch_size, self._rules)
        partitioning.check_batch(mesh, self._layout.size, train.accumulation_steps, self._rules)
        schedule = make_schedule(experiment.optimizer, train.num_steps)
        self._optimizer = make_optimizer(experiment.optimizer, train.num_steps)
        step = make_train_step(
            model,
            self._optimizer,
            schedule,
            seed=train.seed,
            num_steps=train.num_steps,
            accumulation_steps=train.accumulation_steps,
            loss_chunk_size=train.loss_chunk_size,
            task_names=task_names,
        )
        self.state = self._init_state()
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self._step = jax.jit(
            partitioning.placed(step, mesh, self._rules),
            donate_argnums=0,
            out_shardings=(shardings, partitioning.replicated(mesh)),
        )
        self._checkpointer = make_checkpointer(self._workdir, experiment)
        self._meta: dict[str, Any] = {}
        self._window = _Window()

    def _init_state(self) -> TrainState:
        shapes = abstract_adapter(self._model, self._mesh, self._rules)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        adapter = init_adapter(self._model, self._experiment.train.seed, shardings)
        everywhere = partitioning.replicated(self._mesh)
        trained = split_trained(adapter)[0]
        layout = partitioning.optimizer_shardings(
            jax.eval_shape(self._optimizer.init, trained),
            trained,
            split_trained(shardings)[0],
            self._mesh,
        )
        optimizer = jax.jit(self._optimizer.init, out_shardings=layout)(trained)
        step = jax.device_put(jnp.int32(0), everywhere)
        return TrainState(step=step, adapter=adapter, optimizer=optimizer)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint in the run directory, or None."""
        return self._checkpointer.latest_step()

    def resume(self) -> int:
        """Restores the newest checkpoint, if there is one, and returns the step to go on from.

        Raises:
          CheckpointError: if it belongs to another base model or config, or is damaged.
        """
        self._meta = {
            "config": self._experiment.to_dict(),
            "base_fingerprint": fingerprint(self._frozen),
        }
        step = self._checkpointer.latest_step()
        if step is None:
            return 0
        where = self._checkpointer.path(step)
        meta = self._checkpointer.restore_meta(step)
        check_resumable(meta["config"], self._meta["config"], where)
        check_base(meta, self._meta["base_fingerprint"], where)
        rest = {"step": self.state.step, "optimizer": self.state.optimizer}
        adapter, rest, position = self._checkpointer.restore(
            step, abstract(self.state.adapter), abstract(rest)
        )
        self.state = TrainState(adapter=adapter, **rest)
        self._data.restore(position["data"])
        self._window = _Window(position["window"])
        return step

    def run(self) -> str:
        """Trains to the last step. Returns "done", or the name of the signal that stopped it after saving.

        Raises:
          TrainingError: if a loss or gradient is no finite number; names the step and the last good checkpoint.
        """
        train = self._experiment.train
        start = self.resume()
        log, bar = self._start_logs(start)
        vote = multihost.StopVote(self._mesh)
        self._window.restart_clock()
        with _StopSignal() as stop:
            try:
                for step in range(start + 1, train.num_steps + 1):
                    agreed = vote(lambda: stop.received)
                    batch = self._layout.put(self._data.next_batch())
                    self.state, metrics = self._step(self.state, self._frozen, batch)
                    metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
                    self._check_finite(step, metrics, _MUST_BE_FINITE)
                    self._window.add(metrics)
                    bar.update(metrics["loss"], metrics["tokens"])
                    last = step == train.num_steps
                    if step % train.log_every == 0 or last:
                        log.write(step, self._window.summary())
                        self._window = _Window()
                    results = None
                    if last or (train.eval_every and step % train.eval_every == 0):
                        results = self._evaluate_and_log(step, log)
                    stopping = agreed()
                    if step % train.checkpoint_every == 0 or last or stopping or results:
                        self._save(step, results)
                    self._window.restart_clock()
                    if stopping and not last:
                        return stopping
                return "done"
            finally:
                # Still under the handler: a second SIGTERM must not cut off the save that the first one asked for.
                self._checkpointer.wait()
                bar.close()
                log.close()

    def _start_logs(self, start: int) -> tuple[MetricsLog | SilentLog, Progress]:
        """The log and the bar, of which only the main process has visible ones."""
        num_steps = self._experiment.train.num_steps
        if not multihost.is_main():
            return SilentLog(), Progress(num_steps, initial=start, hidden=True)
        self._workdir.mkdir(parents=True, exist_ok=True)
        write_text(self._workdir / CONFIG_FILE, json.dumps(self._meta, indent=1) + "\n")
        log = MetricsLog(self._workdir, start_step=start, tensorboard=self._tensorboard)
        return log, Progress(num_steps, initial=start, description="train")

    def _check_finite(self, step: int, metrics: Mapping[str, float], names: Iterable[str]) -> None:
        for name in names:
            if not math.isfinite(metrics[name]):
                self._checkpointer.wait()
                good = self._checkpointer.latest_step()
                kept = (
                    "there is no checkpoint yet"
                    if good is None
                    else (f"the last good checkpoint is {self._checkpointer.path(good)}")
                )
                raise TrainingError(f"{name} is {metrics[name]} at step {step}; {kept}")

    def _evaluate_and_log(self, step: int, log: MetricsLog) -> dict[str, float] | None:
        if self._evaluate is None:
            return None
        results = dict(self._evaluate(self.state.adapter))
        log.write(step, results)
        self._check_finite(step, results, results)
        return results

    def _save(self, step: int, results: Mapping[str, float] | None) -> None:
        position = {"data": self._data.state(), "window": self._window.state()}
        rest = {"step": self.state.step, "optimizer": self.state.optimizer}
        self._checkpointer.save(step, self.state.adapter, rest, position, self._meta, results)


class _Window:
    """Means of the steps since the last line of the log, and their speed.

    Its state goes into checkpoints, so that a line whose steps lie on both sides of a kill is the unbroken run's.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._counts: dict[str, int] = dict(state["counts"]) if state else {}
        self._timed_count, self._timed_tokens = 0, 0.0
        self._seconds, self._since = 0.0, time.perf_counter()

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # A task that the batch had no tokens of has no value; what must have one is checked before.
            if not math.isnan(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        self._timed_count += 1
        self._timed_tokens += metrics["tokens"]
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now

    def restart_clock(self) -> None:
        """Leaves out the time since the last step, for example of an evaluation."""
        self._since = time.perf_counter()

    def summary(self) -> dict[str, float]:
        values = {f"train/{name}": self._sums[name] / count for name, count in self._counts.items()}
        if self._timed_count:
            values["speed/seconds_per_step"] = self._seconds / self._timed_count
            values["speed/tokens_per_second"] = self._timed_tokens / self._seconds
        return values

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data; time that passed before a kill is not part of it."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check_base(meta: Mapping[str, Any], base_fingerprint: str, where: Path) -> None:
    """Raises CheckpointError unless the checkpoint was trained on the base with this fingerprint."""
    if meta["base_fingerprint"] != base_fingerprint:
        raise CheckpointError(
            f"{where}: was trained on the base model {meta['base_fingerprint']}, the loaded one is {base_fingerprint}:"
            " the adapter fits only the very weights it was trained on"
        )
