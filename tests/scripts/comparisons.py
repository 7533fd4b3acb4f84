"""Comparisons without models, for the tests of scripts/compare*.py: experiments, and scripts that only write results."""

import json
from pathlib import Path

from scripts import compare_runs
from scripts.compare_runs import RunSpec, run_directory
from sira_jax.training.config import ExperimentConfig, make_experiment

# Stands in for scripts/train.py and scripts/evaluate.py: notes that it was called and writes what they would.
FAKE = """
import json, os, pathlib, signal, sys, time

name = pathlib.Path(sys.argv[0]).stem
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).split("=", 1)[1])
with open(os.environ["FAKE_CALLS"], "a") as file:
    file.write(f"{name} {workdir.parent.name} {workdir.name}\\n")
config = json.loads((workdir / "config.json").read_text())["config"]
behaviour = os.environ.get("FAKE_BEHAVIOUR", "")
if behaviour == f"fail {name} {workdir.parent.name}":
    sys.exit("error: no luck today")
if behaviour == f"wait {name} {workdir.parent.name}":
    def save(number, frame):
        (workdir / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    (workdir / "waiting").touch()
    time.sleep(60)
if name == "train":
    (workdir / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
    summary = {"peak_memory_bytes": 100 + config["train"]["seed"], "trained_parameters": 7}
    (workdir / "summary.json").write_text(json.dumps(summary))
else:
    loss = 1.0 + config["train"]["seed"] + (config["adapter"]["method"] == "sira")
    results = {
        "experiment": config,
        "losses": {"test/loss": loss},
        "mean": {"exact_match": 10 * loss},
    }
    (workdir / "evaluation_test.json").write_text(json.dumps(results))
"""


def experiment(method: str = "lora", seed: int = 0, **sections) -> ExperimentConfig:
    """A valid experiment on a model that is not there."""
    adapter = {"method": method}
    if method == "sira":
        adapter |= {"num_experts": 4, "num_selected_experts": 2}
    fields = {
        "model": {"path": "nowhere"},
        "data": {"tasks": ["cldr_number_en"]},
        "adapter": adapter,
        "train": {"seed": seed, "num_steps": 4},
    }
    return make_experiment({**fields, **sections})


def specs(workdir: Path, methods=("lora", "sira"), seeds=(0, 1), **sections):
    """Method -> runs; the frozen model ("none") has one."""
    return {
        method: [
            RunSpec(method, s, run_directory(workdir, method, s), experiment(method, s, **sections))
            for s in (seeds if method != "none" else seeds[:1])
        ]
        for method in methods
    }


def sizes(methods=("lora", "sira")) -> dict:
    """Sizes as plan.json has them."""
    return {
        method: {
            "fields": {} if method != "sira" else {"rank": 1, "alpha": 2.0},
            "trained": 0 if method == "none" else 1000 * (place + 1),
            "active": 0 if method == "none" else 500 * (place + 1),
            "deviation": -1.0 if method == "none" else float(place),
        }
        for place, method in enumerate(methods)
    }


def use_fakes(monkeypatch, folder: Path, behaviour: str = "") -> Path:
    """Puts FAKE in the place of the scripts; returns the file that lists its calls."""
    folder.mkdir(exist_ok=True)
    for name in ("train.py", "evaluate.py"):
        (folder / name).write_text(FAKE)
    monkeypatch.setattr(compare_runs, "SCRIPTS", folder)
    monkeypatch.setenv("FAKE_CALLS", str(folder / "calls.txt"))
    monkeypatch.setenv("FAKE_BEHAVIOUR", behaviour)
    (folder / "calls.txt").write_text("")
    return folder / "calls.txt"


def write_result(spec: RunSpec, loss: float, *, peak: int = 100, **mean: float) -> None:
    """A finished run with these results."""
    (spec.directory / "checkpoints" / "4").mkdir(parents=True)
    results = {
        "experiment": spec.experiment.to_dict(),
        "losses": {"test/loss": loss},
        "mean": mean,
    }
    spec.evaluation_file.write_text(json.dumps(results))
    (spec.directory / "summary.json").write_text(json.dumps({"peak_memory_bytes": peak}))
