"""Every cell of the tables is a valid experiment, and the sweeps hold what the tables need."""

import importlib

import pytest

from configs.experiments import (
    cells,
    table_ablations,
    table_multilingual,
    table_multitask,
    table_single,
)
from scripts.sweep_plan import read_sweep
from sira_jax.errors import ConfigError
from sira_jax.training.config import make_experiment
from tasks import specs

TABLES = ("single", "multilingual", "multitask", "ablations")


def sweep(table, argument, workdir):
    return read_sweep(f"configs/sweeps/table_{table}.py:{argument}", workdir)


@pytest.mark.parametrize("table", TABLES)
def test_every_run_of_the_laptop_is_a_run_of_known_tasks(table, tmp_path):
    for run in sweep(table, "laptop", tmp_path).runs:
        assert run.experiment.model.path == "smollm2-135m"
        assert all(specs.members(name)[0] for name in run.experiment.data.tasks)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("scale", ["paper", "paper-base"])
def test_every_run_of_the_papers_scale_is_valid(table, scale, tmp_path):
    paths = {run.experiment.model.path for run in sweep(table, scale, tmp_path).runs}
    size = "base" if scale == "paper-base" else "xl"
    assert paths == ({f"models/flan-t5-{size}"} if table == "single" else set()) | {
        f"models/mt5-{size}"
    }


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("single", table_single.TASKS["laptop"]),
        ("multilingual", table_multilingual.MIXTURES["laptop"]),
        ("multitask", table_multitask.MIXTURES["laptop"]),
    ],
)
def test_methods_and_seeds(table, columns, tmp_path):
    found = sweep(table, "laptop", tmp_path)
    expected = {
        f"{column}/{method}/seed{seed}"
        for column in columns
        for method in cells.METHODS
        for seed in cells.SEEDS
        # The frozen model does not depend on the seed.
        if method != "none" or seed == 0
    }
    assert {run.name for run in found.runs} == expected
    assert [run.seed for run in found.runs] == sorted(run.seed for run in found.runs)
    others = sweep(table, "laptop,dora,mov", tmp_path).runs
    assert {run.method for run in others} == {"dora", "mov"}


def test_single_tasks_by_name(tmp_path):
    found = sweep("single", "laptop/xtreme_up_ner_sw/gsm8k,lora", tmp_path).runs
    tasks = ("xtreme_up_ner_sw", "gsm8k")
    assert {run.experiment.data.tasks for run in found} == {(task,) for task in tasks}
    assert {run.method for run in found} == {"lora"}


def test_ablations_share_the_default_and_keep_the_scale_of_lora(tmp_path):
    found = sweep("ablations", "laptop", tmp_path)
    assert found.same["capacity/1.25/seed1"] == "k/4/seed1"
    assert found.same["regularizer/load_balance+expert_dropout/seed2"] == "k/4/seed2"
    runs = {run.name: run.experiment for run in found.runs}
    assert len(runs) == 3 * (4 + 5 + 4 + 5 - 2)
    assert {e.adapter.scale for name, e in runs.items() if name.startswith("rank/")} == {2.0}
    assert runs["capacity/unlimited/seed0"].adapter.capacity_factor is None
    assert runs["regularizer/none/seed0"].adapter.router_regularizer == ("none",)
    chosen = {"lora": {"adapter.alpha": 99.0, "optimizer.learning_rate": 0.5}}
    run = read_sweep("configs/sweeps/table_ablations.py:laptop,rank", tmp_path, {}, chosen).runs[1]
    assert (run.experiment.adapter.alpha, run.experiment.optimizer.learning_rate) == (8.0, 0.5)


def test_every_method_is_searched_alike(tmp_path):
    runs = read_sweep("configs/sweeps/search.py:laptop", tmp_path).runs
    by_method = {}
    for run in runs:
        fields = {
            k: v
            for k, v in run.overrides.items()
            if k in ("optimizer.learning_rate", "adapter.alpha")
        }
        by_method.setdefault(run.method, []).append(fields)
        assert run.experiment.evaluate.split == "validation"
        assert run.seed not in cells.SEEDS
    assert set(by_method) == set(cells.METHODS) - {"none"}
    assert all(settings == by_method["lora"] for settings in by_method.values())
    assert len(by_method["lora"]) == 3


def test_the_other_sweeps(tmp_path):
    assert len(read_sweep("configs/sweeps/sira_experts.py", tmp_path).runs) == 18
    assert len(read_sweep("configs/sweeps/sira_random.py:5", tmp_path).runs) == 5


@pytest.mark.parametrize(
    ("name", "cell", "message"),
    [
        ("table_single", "laptop/cldr_date_sw", "SCALE/TASK/METHOD"),
        ("table_single", "desktop/cldr_date_sw/lora", "scale='desktop'"),
        ("table_single", "laptop/cldr_date_sw/nothing", "'nothing'"),
        ("table_multitask", "laptop/no/lora", "MIXTURE='no'.*swahili"),
        ("table_ablations", "laptop/depth/1", "ABLATION='depth'"),
        ("table_ablations", "laptop/k/3", "VALUE='3'"),
    ],
)
def test_mistakes_name_what_is_allowed(name, cell, message):
    with pytest.raises(ConfigError, match=message):
        importlib.import_module(f"configs.experiments.{name}").get_config(cell)


def test_one_cell():
    config = table_ablations.get_config("laptop/k/2")
    assert make_experiment(config.to_dict()).adapter.num_selected_experts == 2
