"""The training loop: steps, logs, evaluations, checkpoints; it can be stopped at any moment and resumed to the same result."""

import contextlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sira_jax.adapters import split_trained
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.checkpoints.orbax import Checkpointer
from sira_jax.errors import StorageError, TrainingError
from sira_jax.files import write_text
from sira_jax.models import Model
from sira_jax.training import bad_loss, checkpoint_files, multihost, partitioning
from sira_jax.training.config import ExperimentConfig
from sira_jax.training.logging import MetricsLog, Progress, SilentLog
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.patient_source import BatchSource, PatientSource
from sira_jax.training.resumable import check_base, check_resumable
from sira_jax.training.train_state import (
    TrainState,
    abstract_adapter,
    init_adapter,
)
from sira_jax.training.train_step import make_train_step
from sira_jax.training.window import Window

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"

Evaluator = Callable[[Any], Mapping[str, float]]


def make_checkpointer(workdir: Path, experiment: ExperimentConfig) -> Checkpointer:
    """The checkpoints of a run directory."""
    train = experiment.train
    return Checkpointer(
        Path(workdir) / CHECKPOINTS,
        keep=train.keep_checkpoints,
        best_metric=train.keep_best,
        best_mode=train.best_mode,
        # A stop in between must not take away what an unbroken run would go back to.
        keep_multiple=train.checkpoint_every if experiment.bad_loss.action == "rewind" else 0,
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
      workdir: run directory; made if missing. Only one run at a time may work there (`run_lock`).
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
        self._data, self._mesh, self._evaluate = PatientSource(data), mesh, evaluate
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
        checkpoint_files.prepare(self._workdir / CHECKPOINTS)
        self._checkpointer = make_checkpointer(self._workdir, experiment)
        self._meta: dict[str, Any] = {}
        self._window = Window()
        self._judge = bad_loss.Judge(experiment.bad_loss)

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
        position = self._restore(step)
        self._data.restore(position["data"])
        self._judge = bad_loss.Judge(self._experiment.bad_loss, position.get("bad_loss"))
        return step

    def _restore(self, step: int) -> dict[str, Any]:
        """Takes state and window from a checkpoint, and returns what else it says of the place in the run."""
        rest = {"step": self.state.step, "optimizer": self.state.optimizer}
        adapter, rest, position = self._checkpointer.restore(
            step, abstract(self.state.adapter), abstract(rest)
        )
        self.state = TrainState(adapter=adapter, **rest)
        self._window = Window(position["window"])
        return position

    def run(self) -> str:
        """Trains to the last step. Returns "done", or the name of the signal that stopped it after saving.

        Raises:
          TrainingError: a loss is bad and bad_loss says to stop; names the step and the last good checkpoint.
          StorageError: a checkpoint or the log cannot be written; names the last good checkpoint.
          DataError: the data source fails again and again.
        """
        start = self.resume()
        log, bar = self._start_logs(start)
        with _StopSignal() as stop:
            try:
                outcome = self._steps(start, stop, log, bar)
                # Still under the handler: a second SIGTERM must not cut off the save that the first one asked for.
                self._checkpointer.wait()
                return outcome
            except BaseException:
                # The error under way says more than that of a save that fails behind it.
                with contextlib.suppress(StorageError):
                    self._checkpointer.wait()
                raise
            finally:
                bar.close()
                log.close()

    def _steps(
        self, step: int, stop: _StopSignal, log: MetricsLog | SilentLog, bar: Progress
    ) -> str:
        train, action = self._experiment.train, self._experiment.bad_loss.action
        vote = multihost.StopVote(self._mesh)
        self._window.restart_clock()
        while step < train.num_steps:
            step += 1
            agreed = vote(lambda: stop.received)
            batch = self._layout.put(self._data.next_batch())
            limit = (self._judge.limit(),) if action == "skip" else ()
            self.state, metrics = self._step(self.state, self._frozen, batch, *limit)
            metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
            problem = self._judge.problem(metrics)
            if problem is not None:
                if action == "stop":
                    self._stop(step, problem)
                self._judge.refuse(step, problem)
            if problem is not None and action == "rewind":
                step = self._rewind(step, problem, log, bar)
                continue
            if problem is None:
                self._judge.accept(metrics["loss"])
            else:
                bar.note(f"warning: {problem} at step {step}: the step is skipped")
                metrics = {name: metrics[name] for name in ("tokens", "skipped")}
            self._window.add(metrics, self._data.waited)
            bar.update(metrics.get("loss"), metrics["tokens"], waited=self._data.waited)
            last = step == train.num_steps
            if step % train.log_every == 0 or last:
                log.write(step, self._window.summary())
                self._window = Window()
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

    def _rewind(self, step: int, problem: str, log: MetricsLog | SilentLog, bar: Progress) -> int:
        """Goes back to the state of the last regular checkpoint, and returns its step; the data stay where they are."""
        self._checkpointer.wait()
        good = checkpoint_files.newest_sound(
            self._checkpointer.directory, self._experiment.train.checkpoint_every
        )
        if good:
            judged = self._restore(good).get("bad_loss")
        else:
            self.state, self._window, judged = self._init_state(), Window(), None
        self._judge = self._judge.rewound(judged)
        # Later ones are of the way that is given up.
        self._checkpointer.delete_after(good)
        log.forget_after(good)
        bar.move_back(good)
        bar.note(
            f"warning: {problem} at step {step}: back to step {good}, and on with the batches that follow"
        )
        self._window.restart_clock()
        return good

    def _start_logs(self, start: int) -> tuple[MetricsLog | SilentLog, Progress]:
        """The log and the bar, of which only the main process has visible ones."""
        num_steps = self._experiment.train.num_steps
        if not multihost.is_main():
            return SilentLog(), Progress(num_steps, initial=start, hidden=True)
        self._workdir.mkdir(parents=True, exist_ok=True)
        write_text(self._workdir / CONFIG_FILE, json.dumps(self._meta, indent=1) + "\n")
        log = MetricsLog(self._workdir, start_step=start, tensorboard=self._tensorboard)
        return log, Progress(num_steps, initial=start, description="train")

    def _stop(self, step: int, problem: str) -> None:
        self._checkpointer.wait()
        good = self._checkpointer.latest_step()
        kept = (
            "there is no checkpoint yet"
            if good is None
            else f"the last good checkpoint is {self._checkpointer.path(good)}"
        )
        raise TrainingError(f"{problem} at step {step}; {kept}")

    def _evaluate_and_log(self, step: int, log: MetricsLog | SilentLog) -> dict[str, float] | None:
        if self._evaluate is None:
            return None
        results = dict(self._evaluate(self.state.adapter))
        log.write(step, results)
        problem = bad_loss.not_finite(results, results)
        if problem is not None:
            self._stop(step, problem)
        return results

    def _save(self, step: int, results: Mapping[str, float] | None) -> None:
        if step % self._experiment.train.checkpoint_every == 0:
            self._judge.passed_checkpoint()
        position = {
            "data": self._data.state(),
            "window": self._window.state(),
            "bad_loss": self._judge.state(),
        }
        rest = {"step": self.state.step, "optimizer": self.state.optimizer}
        self._checkpointer.save(step, self.state.adapter, rest, position, self._meta, results)


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
