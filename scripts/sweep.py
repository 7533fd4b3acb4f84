"""Runs the experiments of a sweep file as a queue that can be stopped and goes on, or writes them as a job array.

  python scripts/sweep.py --sweep=configs/sweeps/sira_experts.py --workdir=runs/experts --dry_run
  python scripts/sweep.py --sweep=configs/sweeps/sira_experts.py --workdir=runs/experts --workers=2
  python scripts/sweep.py --workdir=runs/experts --status
  python scripts/sweep.py --sweep=... --workdir=/shared/experts --jobs=slurm --sbatch=gpus=1 --sbatch=time=12:00:00

A run is trained and evaluated in its own directory in --workdir. Runs that are done are never done again, an interrupted
training resumes from its last checkpoint, a failure is tried again by the next call. Several calls, also on several machines
with one file system, may work on one sweep: each run is one process's. The directory gets sweep.json, results.csv (a line a
run) and NAME/ (run directories); docs/experiments.md says how a sweep file is written.
"""

import fnmatch
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from scripts import sweep_jobs
from scripts.arguments import parse_value
from scripts.cli import run_main
from scripts.compare_runs import Stopped, duration
from scripts.sweep_choice import choose, read_chosen
from scripts.sweep_plan import Sweep, SweepRun, check_runs, load_sweep, read_sweep, save_sweep
from scripts.sweep_queue import STATES, Status, status_of, work
from scripts.sweep_table import write_results
from sira_jax.errors import ConfigError, check
from sira_jax.files import make_directory, write_text

SWEEP = flags.DEFINE_string(
    "sweep", None, "FILE or FILE:ARGUMENT with get_sweep; default: the sweep that --workdir has."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's directory.")
WORKERS = flags.DEFINE_integer("workers", 1, "Runs at once on this machine.", lower_bound=1)
ONLY = flags.DEFINE_list(
    "only", [], "Names of the runs to do, * for any text, as in swahili/*; default: all."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the runs and where each is.")
STATUS = flags.DEFINE_bool("status", False, "Only print where each run of --workdir is.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE for all runs, FIELD dotted; repeatable.")
CHOOSE = flags.DEFINE_string(
    "choose", None, "When all is done, write each method's best setting by this measure."
)
CHOSEN = flags.DEFINE_string("chosen", None, "A chosen.json: settings of methods for these runs.")
JOBS = flags.DEFINE_enum(
    "jobs", None, sweep_jobs.TARGETS, "Only write the runs that are not done as a job array."
)
JOBS_OUT = flags.DEFINE_string("jobs_out", None, "Where --jobs writes; default: --workdir.")
JOB_NAME = flags.DEFINE_string("job_name", "sweep", "Name of the job.")
SBATCH = flags.DEFINE_multi_string("sbatch", [], "Option of sbatch, OPTION=VALUE; repeatable.")
IMAGE = flags.DEFINE_string("image", None, "Container image, for --jobs=gke.")
CLAIM = flags.DEFINE_string("claim", None, "PersistentVolumeClaim of --workdir, for --jobs=gke.")
LIMIT = flags.DEFINE_multi_string(
    "limit", [], "What each run gets, for --jobs=gke, such as nvidia.com/gpu=1; repeatable."
)
NODE = flags.DEFINE_multi_string(
    "node", [], "Label of the nodes, LABEL=VALUE, for --jobs=gke; repeatable."
)
# Given by the script to the processes it starts.
QUEUE = flags.DEFINE_string("queue", None, "Name of the call that this process works for.")

FAILED, STOPPED = 1, 130


def main(argv: list[str]) -> int:
    """Does what the flags say; 1 where a run of the sweep that was asked for is not done."""
    del argv
    if not WORKDIR.value:
        raise ConfigError("--workdir=DIR is needed")
    workdir = Path(WORKDIR.value)
    if QUEUE.value:
        sweep = load_sweep(workdir)
        return _work(_chosen(sweep), sweep, workdir, QUEUE.value)
    sweep = _read_sweep(workdir)
    runs = _chosen(sweep)
    if DRY_RUN.value or STATUS.value:
        print(format_status(sweep, runs))
        return 0
    if JOBS.value:
        _write_jobs(runs, sweep, workdir)
        return 0
    check_runs(runs)
    save_sweep(workdir, sweep)
    status = run_queue(runs, sweep, workdir, WORKERS.value)
    print(f"{format_counts(runs)}; table: {write_results(workdir, sweep.runs)}")
    if CHOOSE.value and status == 0:
        print(f"best settings: {choose(workdir, sweep.runs, CHOOSE.value)}")
    return status


def _read_sweep(workdir: Path) -> Sweep:
    if not SWEEP.value:
        if SET.value or CHOSEN.value:
            raise ConfigError("--set and --chosen need --sweep=FILE, whose runs they change")
        return load_sweep(workdir)
    common = {}
    for item in SET.value:
        field, equals, text = item.partition("=")
        if not equals or "." not in field:
            raise ConfigError(f"--set={item}: write SECTION.FIELD=VALUE")
        common[field] = parse_value(text)
    chosen = read_chosen(CHOSEN.value) if CHOSEN.value else {}
    return read_sweep(SWEEP.value, workdir, common, chosen)


def run_queue(runs: Sequence[SweepRun], sweep: Sweep, workdir: Path, workers: int) -> int:
    """Works on the runs, those of --only, with so many processes; the exit status."""
    queue = uuid.uuid4().hex
    if workers == 1:
        return _work(runs, sweep, workdir, queue)
    command = [sys.executable, __file__, f"--workdir={workdir}", f"--queue={queue}"]
    command.append(f"--only={','.join(ONLY.value)}")
    # In groups of their own: Ctrl-C then reaches them once, through this process.
    started = [subprocess.Popen(command, process_group=0) for _ in range(workers)]

    def stop(*unused):
        for process in started:
            process.send_signal(signal.SIGTERM)

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        statuses = [process.wait() for process in started]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # A worker that ends before the others finds their runs not done yet: only the end counts.
    wrong = [status for status in statuses if status not in (0, FAILED)]
    return wrong[0] if wrong else _status(runs)


def _work(runs: Sequence[SweepRun], sweep: Sweep, workdir: Path, queue: str) -> int:
    try:
        work(runs, workdir, queue, lambda: write_results(workdir, sweep.runs))
    except Stopped:
        return STOPPED
    return _status(runs)


def _status(runs: Sequence[SweepRun]) -> int:
    return 0 if all(run.is_done() for run in runs) else FAILED


def _chosen(sweep: Sweep) -> list[SweepRun]:
    known = {run.name: run for run in sweep.runs}
    chosen: dict[str, SweepRun] = {}
    for pattern in ONLY.value:
        names = [pattern] if pattern in known else fnmatch.filter(known, pattern)
        check(bool(names), "--only", pattern, f"runs of the sweep: {', '.join(known)}")
        chosen |= {name: known[name] for name in names}
    return list(chosen.values() if ONLY.value else known.values())


def _write_jobs(runs: Sequence[SweepRun], sweep: Sweep, workdir: Path) -> None:
    left = [run.name for run in runs if not run.is_done()]
    if not left:
        print("every run is done")
        return
    common = (left, workdir.absolute(), JOB_NAME.value, WORKERS.value)
    if JOBS.value == "slurm":
        files, start = sweep_jobs.slurm(*common, SBATCH.value), "sbatch"
    else:
        wanted = (IMAGE.value, CLAIM.value, LIMIT.value, NODE.value)
        files, start = sweep_jobs.gke(*common, *wanted), "kubectl create -f"
    save_sweep(workdir, sweep)
    out = Path(JOBS_OUT.value or workdir)
    make_directory(out, f"--jobs_out={out}")
    for name, text in files.items():
        write_text(out / name, text)
        print(f"{start} {out / name}   starts {len(left)} runs, {WORKERS.value} at once")


def format_status(sweep: Sweep, runs: Sequence[SweepRun]) -> str:
    """A line a run, and how many are in which state."""
    lines = [_format(run, status_of(run)) for run in runs]
    for name, kept in sweep.same.items():
        again = "was given again" if name == kept else f"is the same run as {kept}"
        lines.append(f"left out: {name} {again}")
    return "\n".join([*lines, format_counts(runs)])


def _format(run: SweepRun, status: Status) -> str:
    text = f"{status.state:8} {run.name}"
    if status.attempts > 1:
        text += f"  ({status.attempts} attempts)"
    if status.seconds:
        text += f"  {duration(status.seconds)}"
    return text + (f"  {status.reason}" if status.reason else "")


def format_counts(runs: Sequence[SweepRun]) -> str:
    """Such as "12 runs: 3 done, 9 waiting"."""
    counts = Counter(status_of(run).state for run in runs)
    shown = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{len(runs)} runs: {shown}"


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run_main(main)
