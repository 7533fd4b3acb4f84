"""Sweep files, the queue and its locks, results.csv and job arrays, with scripts that only write results."""

import csv
import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from configs.sweeps.space import grid, log_uniform, product, random_search, uniform
from scripts import sweep_plan, sweep_queue
from scripts.sweep_choice import choose, read_chosen
from scripts.sweep_plan import load_sweep, read_sweep, save_sweep
from scripts.sweep_queue import status_of, work
from scripts.sweep_table import write_results
from sira_jax.errors import CheckpointError, ConfigError, DataError, StorageError
from tests.scripts.adapter_runs import make_runner
from tests.scripts.comparisons import use_fakes

CONFIG = """
from configs import base
from configs.adapters import lora, none, sira

def get_config(method="lora"):
    if method == "nothing":
        return None
    config = base.get_config()
    config.adapter = {"lora": lora, "none": none, "sira": sira}[method].get_config()
    config.model.path = "nowhere"
    config.train.num_steps = 4
    return config
"""


@pytest.fixture
def sweep_file(tmp_path):
    """A function that writes a sweep file with this body of get_sweep and returns its path."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)

    def write(body: str, arguments: str = "") -> str:
        path = tmp_path / "sweep.py"
        head = f'CONFIG = "{config}:sira"\nTINY = "{config}"\n'
        path.write_text(f"{head}def get_sweep({arguments}):\n    {body}\n")
        return str(path)

    return write


def four(sweep_file):
    return sweep_file(
        'return [{"name": f"{m}/seed{s}", "config": f"{TINY}:{m}", "train.seed": s}'
        ' for s in (0, 1) for m in ("lora", "sira")]'
    )


def calls(file):
    return [line.split() for line in file.read_text().splitlines()]


def test_spaces():
    assert grid({"a.b": (1, 2), "c.d": ("x", "y")}) == [
        {"a.b": 1, "c.d": "x"},
        {"a.b": 1, "c.d": "y"},
        {"a.b": 2, "c.d": "x"},
        {"a.b": 2, "c.d": "y"},
    ]
    assert product([{"a": 1, "b": 2}], [{"b": 3}, {"c": 4}]) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 2, "c": 4},
    ]
    axes = {"a": log_uniform(1e-4, 1e-2), "b": (1, 2, 3), "c": uniform(-1.0, 1.0)}
    drawn = random_search(200, axes)
    assert drawn[:20] == random_search(20, axes) != random_search(20, axes, seed=1)
    assert all(1e-4 <= run["a"] <= 1e-2 and -1 <= run["c"] <= 1 for run in drawn)
    # Half of a logarithmic axis lies under its geometric middle; of an even one nearly none would.
    assert 60 < sum(run["a"] < 1e-3 for run in drawn) < 140
    assert {run["b"] for run in drawn} == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"grid: a=5"):
        grid({"a": 5})
    with pytest.raises(ConfigError, match=r"random_search: a=\[\]"):
        random_search(2, {"a": []})
    assert grid({"a": np.array([1, 2])}) == grid({"a": (x for x in (1, 2))}) == grid({"a": (1, 2)})


def test_names_fields_and_equal_runs(sweep_file, tmp_path):
    path = sweep_file(
        "yield {'adapter.rank': 2, 'adapter.alpha': 1.5, 'data.tasks': ('cldr_sw', 'bfcl')}\n"
        "    yield {'adapter.router_regularizer': 'none', 'train.seed': 3}\n"
        "    yield {'name': 'again', 'train.seed': 3, 'adapter.router_regularizer': ('none',)}\n"
        "    yield {'name': 'base/0', 'config': TINY + ':none'}\n"
        "    yield {'name': 'base/1', 'config': TINY + ':none', 'train.seed': 1}"
    )
    sweep = read_sweep(path, tmp_path)
    assert [run.name for run in sweep.runs] == [
        "sira-rank=2-alpha=1.5-tasks=cldr_sw+bfcl",
        "sira-router_regularizer=none-seed=3",
        "base/0",
    ]
    # The frozen model is the same whatever the seed of a training that does not take place.
    assert sweep.same == {"again": "sira-router_regularizer=none-seed=3", "base/1": "base/0"}
    first = sweep.runs[0]
    assert first.directory == tmp_path / first.name
    assert first.experiment.adapter.rank == 2
    assert first.experiment.data.tasks == ("cldr_sw", "bfcl")
    assert [(run.method, run.seed) for run in sweep.runs[1:]] == [("sira", 3), ("none", 0)]
    save_sweep(tmp_path, sweep)
    assert load_sweep(tmp_path) == sweep


def test_a_run_that_is_given_again_is_done_once(sweep_file, tmp_path):
    """As by a random search over few values."""
    path = sweep_file("return [{'train.seed': s} for s in (0, 1, 0, 0)]")
    sweep = read_sweep(path, tmp_path)
    assert [run.name for run in sweep.runs] == ["sira-seed=0", "sira-seed=1"]
    assert sweep.same == {"sira-seed=0": "sira-seed=0"}


def test_numbers_of_numpy(sweep_file, tmp_path):
    path = sweep_file(
        "import numpy as np\n"
        "    return ({'train.seed': s, 'optimizer.learning_rate': np.float32(0.5), 'data.pack': np.bool_(1)}"
        " for s in np.arange(2))"
    )
    sweep = read_sweep(path, tmp_path)
    assert [run.seed for run in sweep.runs] == [0, 1]
    assert sweep.runs[0].name == "sira-seed=0-learning_rate=0.5-pack=True"
    save_sweep(tmp_path, sweep)
    assert load_sweep(tmp_path) == sweep


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [{'train.seed': print}]", r"run 0: train\.seed=<built-in.* is not allowed"),
        ("return [{'data.tasks': {'a'}}]", r"run 0: data\.tasks=\{'a'\} is not allowed"),
        ("return [{'adapter': {'rank': 2}}]", r"is a section, write adapter\.FIELD"),
        ("return [{'name': 'a' * 201}]", r"has 201 characters: at most 200"),
        ("return [{'name': 'results.csv'}]", r"name='results\.csv' is not allowed: the sweep's"),
        ("return [{'name': 'a/checkpoints'}]", r"name='a/checkpoints' is not allowed"),
        ("return map(lambda x: 1 // x, (1, 0))", r"sweep\.py, line 4: ZeroDivisionError"),
        ("raise SystemExit(0)", r"sweep\.py, line 4: SystemExit: 0"),
        ("return [{'config': TINY + ':nothing'}]", r"get_config must return a ConfigDict"),
        ("return [{'adapter.rnk': 2}]", r"run 0: adapter\.rnk=2: no such field; there are .*rank"),
        ("return [{}, {'adapter.rank': 0}]", r"run 1 \(sira-rank=0\): adapter\.rank=0 is not"),
        ("return [{'rank': 2}]", r"rank=2: no such field; there are .*adapter"),
        ("return [{'name': '../up'}]", r"name='\.\./up' is not allowed"),
        ("return [{'name': 'a'}, {'name': 'a/b', 'train.seed': 1}]", r"'a/b' would lie in"),
        ("return [{'name': 'a'}, {'name': 'a', 'train.seed': 1}]", r"'a' is given to two runs"),
        ("return [{'config': 'no/such.py'}]", r"run 0: config=no/such\.py: no such file"),
        ("return [{'config': TINY + ':other'}]", r"tiny\.py:other, line \d+: KeyError"),
        ("return [3]", r"run 0: 3 is not allowed: a dictionary"),
        ("return {}", r"must return a list"),
        ("return []", r"returned no run"),
        ("1 / 0", r"sweep\.py, line 4: ZeroDivisionError"),
    ],
)
def test_mistakes_in_sweep_files(sweep_file, tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(body), tmp_path)


def test_arguments_of_sweep_files(sweep_file, tmp_path):
    path = sweep_file("return [{'train.seed': int(n)}]", "n")
    assert read_sweep(f"{path}:7", tmp_path).runs[0].seed == 7
    with pytest.raises(ConfigError, match=r"get_sweep does not take this"):
        read_sweep(path, tmp_path)
    with pytest.raises(ConfigError, match=r"--sweep=nowhere\.py: no such file"):
        read_sweep("nowhere.py", tmp_path)
    with pytest.raises(DataError, match=r"sweep\.json: there is no sweep"):
        load_sweep(tmp_path / "other")


def test_no_run_is_done_twice_and_failures_are_tried_once_a_call(sweep_file, tmp_path, monkeypatch):
    file = use_fakes(monkeypatch, tmp_path / "fakes", "fail train sira")
    runs = read_sweep(four(sweep_file), tmp_path).runs
    work(runs, tmp_path, "first")
    # A second worker of the same call begins nothing again.
    work(runs, tmp_path, "first")
    assert calls(file) == [
        ["train", "lora", "seed0"],
        ["evaluate", "lora", "seed0"],
        ["train", "sira", "seed0"],
        ["train", "lora", "seed1"],
        ["evaluate", "lora", "seed1"],
        ["train", "sira", "seed1"],
    ]
    reason = "train.py ended with status 1: error: no luck today"
    status = status_of(runs[1])
    assert (status.state, status.reason, status.attempts) == ("failed", reason, 1)
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    work(runs, tmp_path, "second")
    assert [call[:2] for call in calls(file)] == [["train", "sira"], ["evaluate", "sira"]] * 2
    assert [(status_of(run).state, status_of(run).attempts) for run in runs] == [
        ("done", 1),
        ("done", 2),
    ] * 2


def test_a_run_that_another_process_works_on_is_left_to_it(
    sweep_file, tmp_path, monkeypatch, capsys
):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    runs = read_sweep(four(sweep_file), tmp_path).runs
    assert {status_of(run).state for run in runs} == {"waiting"}
    with sweep_queue._locked(runs[0]) as lock:
        assert lock is not None
        assert status_of(runs[0]).state == "running"
        work(runs[:2], tmp_path, "other")
    assert [call[:2] for call in calls(file)] == [["train", "sira"], ["evaluate", "sira"]]
    assert "[1/2] lora/seed0: another process works on it" in capsys.readouterr().out
    assert status_of(runs[0]).state == "waiting"
    # What has begun and has no end was killed.
    (runs[0].directory / "attempts.jsonl").write_text('{"event": "start", "queue": "x"}\n{"ev')
    assert status_of(runs[0]).state == "stopped"


def test_several_workers_share_the_runs(sweep_file, tmp_path, monkeypatch):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    runs = read_sweep(four(sweep_file), tmp_path).runs
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(runs, tmp_path, "q")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    done = calls(file)
    assert len(done) == 8
    assert len({tuple(call) for call in done}) == 8
    assert all(status_of(run).state == "done" for run in runs)


def test_the_lock_lives_as_long_as_the_training(sweep_file, tmp_path, monkeypatch):
    """A worker that is killed leaves its training running, which must keep others away."""
    use_fakes(monkeypatch, tmp_path / "fakes", "wait train lora")
    run = read_sweep(four(sweep_file), tmp_path).runs[0]
    worker = multiprocessing.get_context("fork").Process(target=work, args=([run], tmp_path, "q"))
    worker.start()
    while not (run.directory / "waiting").exists():
        assert worker.is_alive()
    worker.kill()
    worker.join()
    assert status_of(run).state == "running"
    with (run.directory / "lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    found = subprocess.run(["pgrep", "-f", str(run.directory)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), 9)
    for _ in range(1000):
        if status_of(run).state == "stopped":
            break
    assert status_of(run).state == "stopped"


def test_fields_for_all_runs_and_for_methods(sweep_file, tmp_path):
    path = sweep_file(
        "return [{'name': 'a'}, {'name': 'b', 'adapter.rank': 3}, {'name': 'c', 'config': TINY}]"
    )
    chosen = {"sira": {"adapter.rank": 7, "optimizer.learning_rate": 0.5}}
    runs = read_sweep(path, tmp_path, {"train.num_steps": 9}, chosen).runs
    assert [run.experiment.adapter.rank for run in runs] == [7, 3, 4]
    assert [run.experiment.optimizer.learning_rate for run in runs] == [0.5, 0.5, 1e-3]
    assert {run.experiment.train.num_steps for run in runs} == {9}


def test_the_best_setting_of_each_method(sweep_file, tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes")
    path = sweep_file(
        'return [{"config": f"{TINY}:{m}", "adapter.rank": r, "train.seed": s + (r == 2)}'
        ' for s in (0, 1) for m in ("lora", "sira") for r in (1, 2)]'
    )
    runs = read_sweep(path, tmp_path).runs
    with pytest.raises(DataError, match=r"lora-rank=1-seed=0 was not run yet; all runs must be"):
        choose(tmp_path, runs, "test/loss")
    work(runs, tmp_path, "q")
    # The loss is 1 + seed, one more for sira: mean 1.5 and 2.5 of lora's ranks.
    file = choose(tmp_path, runs, "test/loss")
    lora = json.loads(file.read_text())["methods"]["lora"]
    assert lora["overrides"] == {"adapter.rank": 1}
    assert lora["tried"] == {'{"adapter.rank": 1}': 1.5, '{"adapter.rank": 2}': 2.5}
    assert read_chosen(file) == {"lora": {"adapter.rank": 1}, "sira": {"adapter.rank": 1}}
    # The exact match is ten times the loss, and more is better.
    assert read_chosen(choose(tmp_path, runs, "exact_match"))["sira"] == {"adapter.rank": 2}
    with pytest.raises(DataError, match=r"--choose=chrf: .* has None; it has test/loss"):
        choose(tmp_path, runs, "chrf")
    with pytest.raises(ConfigError, match=r"--chosen=.*calls\.txt: is no chosen\.json"):
        read_chosen(tmp_path / "fakes" / "calls.txt")


def test_lines_of_errors_are_found_by_any_spelling(sweep_file, tmp_path, monkeypatch):
    sweep_file("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--sweep=\./sweep\.py, line 4: ZeroDivisionError"):
        read_sweep("./sweep.py", tmp_path)


def test_results_are_there_while_others_run(sweep_file, tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes")
    runs = read_sweep(four(sweep_file), tmp_path).runs
    states = []

    def after_each():
        with write_results(tmp_path, runs).open() as file:
            states.append([line["state"] for line in csv.DictReader(file)])

    work(runs[:2], tmp_path, "q", after_each)
    assert states == [["done", *["waiting"] * 3], ["done", "done", *["waiting"] * 2]]


def test_a_working_directory_that_is_none(sweep_file, tmp_path):
    sweep = read_sweep(four(sweep_file), tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"--workdir=.*file.*: is not a directory"):
            save_sweep(path, sweep)


def test_a_full_disk_is_named(sweep_file, tmp_path, monkeypatch):
    run = read_sweep(four(sweep_file), tmp_path).runs[0]

    def refuse(*unused, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"lora/seed0: cannot be written: No space left"):
        work([run], tmp_path, "q")


def test_results_are_one_line_a_run(sweep_file, tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes", "fail evaluate sira")
    runs = read_sweep(four(sweep_file), tmp_path).runs
    work(runs[:3], tmp_path, "q")
    with write_results(tmp_path, runs).open() as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == [run.name for run in runs]
    assert [line["state"] for line in lines] == ["done", "failed", "done", "waiting"]
    assert [line["test/loss"] for line in lines] == ["1.0", "", "2.0", ""]
    assert [line["mean exact_match"] for line in lines] == ["10.0", "", "20.0", ""]
    assert [line["train.seed"] for line in lines] == ["0", "0", "1", "1"]
    assert lines[0]["trained_parameters"] == "7"
    assert "no luck" in lines[1]["reason"]
    assert {line["method"] for line in lines} == {"lora", "sira"}


def test_the_script(sweep_file, tmp_path, monkeypatch, capsys):
    file = use_fakes(monkeypatch, tmp_path / "fakes")
    planned = []
    monkeypatch.setattr(sweep_plan.assemble, "Plan", planned.append)
    call = make_runner(tmp_path, monkeypatch, capsys)
    path, workdir = four(sweep_file), f"--workdir={tmp_path / 'w'}"
    out = call("sweep", f"--sweep={path}", workdir, "--dry_run")
    assert out.splitlines()[0] == "waiting  lora/seed0"
    assert out.splitlines()[-1] == "4 runs: 4 waiting"
    assert not (tmp_path / "w").exists()
    out = call("sweep", f"--sweep={path}", workdir, "--dry_run", "--only=*/seed1")
    assert [line.split()[-1] for line in out.splitlines()[:-1]] == ["lora/seed1", "sira/seed1"]
    call("sweep", f"--sweep={path}", workdir, "--only=lora/seed1,sira/seed0")
    assert [c[1:] for c in calls(file)] == [["lora", "seed1"]] * 2 + [["sira", "seed0"]] * 2
    # A config is looked at once, whatever its seeds.
    assert [run.adapter.method for run in planned] == ["lora", "sira"]
    assert (tmp_path / "w" / "results.csv").exists()
    assert "4 runs: 2 done, 2 waiting" in call("sweep", workdir, "--status")
    call("sweep", workdir, "--jobs=slurm", f"--jobs_out={tmp_path / 'jobs'}", "--sbatch=gpus=1")
    text = (tmp_path / "jobs" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1%1\n" in text
    assert "RUNS=(lora/seed0 sira/seed1)\n" in text
    new = tmp_path / "new"
    with pytest.raises(ConfigError, match="needs --image"):
        call("sweep", f"--sweep={path}", f"--workdir={new}", "--jobs=gke")
    assert not new.exists()
    call("sweep", workdir)
    assert "4 runs: 4 done" in call("sweep", workdir, "--status")
    assert len(calls(file)) == 8
    with pytest.raises(ConfigError, match="--only='nobody'"):
        call("sweep", workdir, "--only=nobody")


def test_another_experiment_in_the_directory_is_refused(sweep_file, tmp_path, monkeypatch):
    use_fakes(monkeypatch, tmp_path / "fakes")
    work(read_sweep(sweep_file("return [{'name': 'a'}]"), tmp_path).runs, tmp_path, "q")
    changed = read_sweep(sweep_file("return [{'name': 'a', 'adapter.rank': 9}]"), tmp_path).runs
    with pytest.raises(CheckpointError, match=r"a: .*adapter\.rank"):
        sweep_plan.check_runs(changed)
