"""Fine-tunes an adapter on a frozen language model.

  python scripts/train.py --config=configs/experiments/starter.py:sira --workdir=runs/sira
  python scripts/train.py --config=... --workdir=... --config.adapter.rank=8 --config.train.num_steps=500

The run directory gets config.json, metrics.jsonl, tensorboard/, router.json and checkpoints/. Run the same command again to go
on after a stop of any kind; the result is that of an unbroken run. SIGTERM and Ctrl-C save first.

With --multihost this is one of several processes, which are all started with the same flags and see the same run directory;
docs/scaling.md says how they find each other.
"""

import contextlib
import json
import signal
import statistics
import sys
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from scripts import assemble
from scripts.cli import run_main
from scripts.run_results import SUMMARY_FILE
from sira_jax.errors import ConfigError
from sira_jax.files import write_text
from sira_jax.training import loop, multihost, run_lock
from sira_jax.training.logging import read_metrics
from sira_jax.training.train_state import count, count_trained, split_params
from tasks import data_files

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a Python file in configs/."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
MULTIHOST = flags.DEFINE_bool("multihost", False, "Run as one of several processes.")
PATIENCE = flags.DEFINE_float(
    "multihost_patience",
    60.0,
    "Seconds without a sign of life after which a process counts as lost and the others stop.",
    lower_bound=3.0,
)
TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Write TensorBoard event files.")
ALLOW_CHANGED_DATA = flags.DEFINE_bool(
    "allow_changed_data", False, "Go on from a checkpoint although data files have changed."
)
LOCK_PATIENCE = flags.DEFINE_float(
    "lock_patience",
    None,
    "Seconds to wait for another run in the same run directory to end; by default 0, and 120 with a --stopped_status, since"
    " a file server keeps the lock of a lost machine for a while.",
    lower_bound=0.0,
)
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status after a signal stopped the run and it was saved; a cluster takes 0 for the end of the run.",
    lower_bound=0,
    upper_bound=255,
)


def main(argv: list[str]) -> int:
    """Trains; returns the exit status."""
    del argv
    if not WORKDIR.value:
        raise ConfigError("--workdir=DIR is needed")
    experiment = assemble.read_experiment(CONFIG.value, WORKDIR.value)
    if experiment.adapter is None:
        raise ConfigError("adapter.method='none' is not allowed: there is nothing to train")
    together = contextlib.nullcontext()
    if MULTIHOST.value:
        together = multihost.joined(PATIENCE.value)
    else:
        # While the loop runs its own handler saves first; before it there is nothing to save.
        signal.signal(signal.SIGTERM, _leave)
    with together:
        plan = assemble.Plan(experiment)
        workdir = Path(WORKDIR.value)
        is_main = multihost.is_main()
        patience = LOCK_PATIENCE.value
        if patience is None:
            patience = 120.0 if STOPPED_STATUS.value else 0.0
        lock = run_lock.held(workdir, patience) if is_main else contextlib.nullcontext()
        with lock:
            outcome = train(
                plan,
                workdir,
                tensorboard=TENSORBOARD.value,
                allow_changed_data=ALLOW_CHANGED_DATA.value,
            )
    if outcome == "done":
        return 0
    if is_main:
        print(f"stopped by {outcome} after saving; the same command goes on from there")
    return STOPPED_STATUS.value


def _leave(number: int, frame: object) -> NoReturn:
    del number, frame
    print("stopped by SIGTERM outside the training steps; the same command goes on from there")
    sys.exit(STOPPED_STATUS.value)


def train(
    plan: assemble.Plan,
    workdir: Path,
    *,
    tensorboard: bool = True,
    allow_changed_data: bool = False,
) -> str:
    """Runs or resumes the plan's experiment in `workdir`; returns what `Trainer.run` returns.

    No other run may work in `workdir`; `allow_changed_data` lets it go on from a checkpoint that was made with other data.
    """
    experiment = plan.experiment
    with data_files.recorded() as files:
        loaded, rates = plan.load_tasks("train")
        held_out, _ = plan.load_tasks("validation", experiment.evaluate.loss_examples_per_task)
    pipeline = plan.pipeline(loaded, rates, data_files.fingerprints(files), allow_changed_data)
    is_main = multihost.is_main()
    for report in pipeline.reports:
        if is_main and (report.truncated or report.dropped):
            print(report)
    base = plan.load_base()
    frozen = split_params(base.params)[1]
    model = plan.model(len(loaded))
    evaluator = plan.loss_evaluator(model, frozen, held_out, "validation")
    trainer = loop.Trainer(
        experiment,
        model,
        frozen,
        pipeline,
        workdir,
        plan.mesh,
        evaluate=evaluator,
        task_names=[task.name for task in loaded],
        tensorboard=tensorboard,
    )
    trained, total = count_trained(trainer.state.adapter), count(frozen)
    if is_main:
        print(
            f"{experiment.adapter.method}: {trained:,} trained parameters, {trained / total:.2%} of the"
            f" base's {total:,}; {len(loaded)} tasks, {sum(map(len, loaded)):,} examples"
        )
    resumed_at_end = trainer.latest_step() == experiment.train.num_steps
    outcome = trainer.run()
    if outcome == "done" and not (resumed_at_end and (workdir / SUMMARY_FILE).exists()):
        _, report = evaluator.run(trainer.state.adapter)
        if report and is_main:
            write_text(workdir / "router.json", json.dumps(report))
        # The last one: it says that the run is complete.
        if is_main:
            _write_summary(plan, workdir, trained, total)
    return outcome


def _write_summary(plan: assemble.Plan, workdir: Path, trained: int, total: int) -> None:
    """Writes summary.json: sizes, median time of a step and this process's peak memory."""
    lines = [line for line in read_metrics(workdir) if "train/tokens" in line]
    seconds = [line["speed/seconds_per_step"] for line in lines if "speed/seconds_per_step" in line]
    train_config = plan.experiment.train
    summary = {
        "method": plan.experiment.adapter.method,
        "trained_parameters": trained,
        "base_parameters": total,
        "steps": train_config.num_steps,
        "batch_size": plan.experiment.data.batch_size,
        "sequence_length": plan.experiment.data.sequence_length,
        "tokens": train_config.num_steps * statistics.fmean(line["train/tokens"] for line in lines),
        # The first line's time holds the compilation.
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "peak_memory_bytes": assemble.peak_memory_bytes(),
    }
    write_text(workdir / SUMMARY_FILE, json.dumps(summary, indent=1))


if __name__ == "__main__":
    run_main(main)
