"""Configs and results of runs, plans and files of sweeps, launches, and flags."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from scripts import assemble, cli, run_results, sweep_plan, table_cells
from scripts.launch.config import make_launch
from scripts.launch.targets import TARGETS as LAUNCHERS
from sira_jax import json_text
from sira_jax.adapters import METHODS
from sira_jax.errors import ConfigError
from sira_jax.files import read_bytes
from sira_jax.training.config import make_experiment
from tests.adapters.test_every_method import make
from tests.fuzz import adapter_files
from tests.integration.mistakes import fields
from tests.scripts import flagged, synthetic_runs


def _experiment(**changes: Any) -> dict[str, Any]:
    return make_experiment(fields("m.gguf", **changes)).to_dict()


def load_run_config(folder: Path) -> None:
    experiment = assemble.read_experiment(None, str(folder))
    assert make_experiment(json.loads(json.dumps(experiment.to_dict()))) == experiment


def make_run_configs(folder: Path) -> None:
    """A run directory of each method."""
    for method in METHODS:
        path = folder / method
        path.mkdir()
        adapter = json.loads(json.dumps(make(method).to_dict()))
        config = _experiment(adapter=adapter, mesh={"rules": [["embed", ["data", "fsdp"]]]})
        (path / "config.json").write_text(
            json.dumps({"config": config, "base_fingerprint": adapter_files.BASE})
        )


def make_sweep_plan(folder: Path) -> None:
    runs = [
        {
            "name": f"a/rank={rank}",
            "config": "configs/base.py",
            "overrides": {"adapter.rank": rank},
            "experiment": _experiment(),
        }
        for rank in (1, 2)
    ]
    plan = {"sweep": "sweep.py", "runs": runs, "same": {"b": "a/rank=1"}}
    (folder / "sweep.json").write_text(json.dumps(plan))


def load_sweep_plan(folder: Path) -> None:
    sweep = sweep_plan.load_sweep(folder)
    for run in sweep.runs:
        assert run.directory.resolve().is_relative_to(folder.resolve()), run.directory
        run.is_done()
        run.failure()


def make_results(folder: Path) -> None:
    """A comparison's plan, and a run with all that the reports read."""
    run = synthetic_runs.make_run(folder / "run", routers=True)
    experiment = _experiment(evaluate={"split": "test"})
    (run / "config.json").write_text(json.dumps({"config": experiment}))
    path = run / "evaluation_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experiment": experiment}))
    (run / "checkpoints/20").mkdir(parents=True)
    (run / "checkpoints/20/_").touch()
    plan = {"settings": {"metric": "f1"}, "runs": {"sira": [[0, experiment]]}}
    (folder / "plan.json").write_text(json.dumps(plan))


def load_results(folder: Path) -> None:
    run_results.read_runs({"one": folder / "run"})
    trials = table_cells.find_trials([folder])
    assert all(trial.run is not None or trial.reason for trial in trials)


def make_sweep_file(folder: Path) -> None:
    """A sweep file whose runs are in a JSON file, so that they are changed as JSON is."""
    runs = [
        {"adapter.rank": 2, "train.seed": 1, "name": "a"},
        {"optimizer.learning_rate": 0.1, "data.tasks": ["cldr_all"]},
    ]
    (folder / "runs.json").write_text(
        json.dumps({"runs": runs, "config": "configs/experiments/starter.py:sira"})
    )
    (folder / "sweep.py").write_text(
        "from pathlib import Path\n"
        "from sira_jax import files, json_text\n"
        "CONTENT = json_text.parse(files.read_bytes(Path(__file__).parent / 'runs.json'))\n"
        "CONFIG = CONTENT['config']\n"
        "def get_sweep():\n    return CONTENT['runs']\n"
    )


def load_sweep_file(folder: Path) -> None:
    sweep = sweep_plan.read_sweep(str(folder / "sweep.py"), folder / "out")
    sweep_plan.save_sweep(folder / "out", sweep)
    again = sweep_plan.load_sweep(folder / "out")
    assert [run.experiment for run in again.runs] == [run.experiment for run in sweep.runs]


def make_launch_config(folder: Path) -> None:
    from configs.launch import starter

    content = starter.get_config().to_dict()
    content["job"] |= {
        "output": "gs://bucket/runs", "image": "host/image:1", "checkout": "/home/x/sira", "repository": "https://x/y.git",
        "env": {"A": "b"}, "sweep": [["--config.train.seed=1"], ["--config.train.seed=2"]],
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(content))


def load_launch_config(folder: Path) -> None:
    try:
        content = json_text.parse(read_bytes(folder / "launch.json"))
    except (OSError, ValueError):
        return  # a launch config is a Python file: only the values are of interest
    if not isinstance(content, dict):
        return
    config = make_launch(content)
    refusals = []
    for render in LAUNCHERS.values():  # not every launch is for every target
        try:
            render(config)
        except ConfigError as error:
            refusals.append(error)
    if len(refusals) == len(LAUNCHERS):
        raise refusals[0]


def make_flags(folder: Path) -> None:
    """Arguments of train.py, one a file, so that each is changed alone."""
    arguments = [
        "--config=configs/experiments/starter.py:sira", "--config.train.num_steps=30", "--config.model.path=x",
        "--config.optimizer.learning_rate=1e-3", "--config.data.tasks=cldr_all,bfcl", "--config.data.pack=false",
        "--config.optimizer.clip_norm=None", "--config.adapter.targets=('q', 'v')", "--config.mesh.rules=()",
    ]  # fmt: skip
    (folder / "one").mkdir()
    (folder / "one/flags.json").write_text(json.dumps(arguments))


def load_flags(folder: Path) -> None:
    """Parses as train.py does."""
    try:
        arguments = json_text.parse(read_bytes(folder / "flags.json"))
    except (OSError, ValueError):
        return  # how the arguments are kept here is nothing of ours
    if not isinstance(arguments, list) or any(
        type(one) is not str or "\0" in one for one in arguments
    ):
        return
    argv, shown = ["train.py", *arguments], io.StringIO()
    before = sys.argv
    sys.argv = argv  # ml_collections looks there for the fields
    try:
        with flagged.imported("train") as train:
            with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
                cli._parse(argv)
            if train.CONFIG.value is not None:
                make_experiment(train.CONFIG.value.to_dict())
    except SystemExit as error:
        if error.code == cli.USER_ERROR:
            raise ConfigError(shown.getvalue().rstrip("\n")) from None
        if error.code:  # 0 is that of --help
            raise
    finally:
        sys.argv = before
