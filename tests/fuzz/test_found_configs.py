"""Damaged configs, results and data files that were once too much for their readers: now each is one line."""

import json

import pytest
from ml_collections import ConfigDict

from scripts import assemble, cli, run_results, sweep_plan
from scripts.base_models import find_model
from scripts.launch.config import make_launch
from scripts.launch.tpus import TpuConfig
from sira_jax.adapters import make_config
from sira_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
)
from tasks.finqa_program import ProgramError, execute
from tests.fuzz import adapter_files, config_files, data_files
from tests.fuzz.found import DEEP, MANY_DIGITS, assert_mistake_of_any_length, edit
from tests.integration.mistakes import assert_mistake
from tests.scripts import synthetic_runs


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000 + ")" * 5000, "[[a]"])
def test_patterns_that_cannot_be_compiled(pattern):
    assert_mistake_of_any_length(
        ConfigError,
        lambda: make_config({"method": "lora", "targets": [pattern]}),
        "adapter.targets",
    )


@pytest.mark.parametrize("text", [DEEP, '{"config": ' + MANY_DIGITS + "}", '{"config": 3}'])
def test_config_json_of_a_run(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert_mistake(
        ConfigError, lambda: assemble.read_experiment(None, str(tmp_path)), tmp_path / "config.json"
    )


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../../b", 3, ""])
def test_a_sweep_whose_runs_would_lie_elsewhere(name, tmp_path):
    config_files.make_sweep_plan(tmp_path)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan["runs"][0]["name"] = name
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert_mistake(DataError, lambda: sweep_plan.load_sweep(tmp_path), tmp_path / "sweep.json")


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ({"adapter.rank": {"adapter.rank": 1}, "name": "a"}, "adapter.rank="),
        ({"config": "x" * 5000, "name": "a"}, "no such file"),
        ({"name": "a/" + "x" * 300}, "300 characters"),
        ({"data.vocabulary": "x" * 300}, "at most 200"),
    ],
)
def test_a_run_of_a_sweep_file(run, named, tmp_path):
    config_files.make_sweep_file(tmp_path)
    edit(tmp_path / "runs.json", runs=[run])

    def read():
        sweep_plan.read_sweep(str(tmp_path / "sweep.py"), tmp_path / "out")

    assert_mistake_of_any_length(ConfigError, read, tmp_path / "sweep.py", named)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_model_whose_path_no_file_can_have(path):
    assert_mistake_of_any_length(
        ConfigError, lambda: find_model(path), "model.path", "no such file"
    )


@pytest.mark.parametrize("section", [True, 3, None, "text", [1]])
def test_a_section_of_a_launch_that_is_none(section):
    assert_mistake(ConfigError, lambda: make_launch({"job": section}), "job=", "a mapping")


def test_results_that_are_nested_too_deeply(tmp_path):
    (tmp_path / "router_test.json").write_text(DEEP)
    assert_mistake(
        DataError, lambda: run_results.read_runs({"a": tmp_path}), tmp_path / "router_test.json"
    )


@pytest.mark.parametrize("value", [{"a": 1}, 10**400, "x"])
def test_statistics_that_are_no_numbers(value, tmp_path):
    run = synthetic_runs.make_run(tmp_path / "run", routers=True)
    report = json.loads((run / "router_test.json").read_text())
    report["projections"]["mlp/down"]["gate_entropy"] = [value]
    (run / "router_test.json").write_text(json.dumps(report))
    named = (run / "router_test.json", "mlp/down: gate_entropy")
    assert_mistake(DataError, lambda: run_results.read_runs({"a": run}), *named)


@pytest.mark.parametrize("generation", [["v5e"], {}, None])
def test_a_generation_of_a_launch_that_is_no_text(generation):
    assert_mistake(ConfigError, lambda: TpuConfig(generation=generation), "tpu.generation")


def test_a_flag_whose_field_has_odd_characters():
    config = ConfigDict({"mesh": {"rules": ()}})
    for argument in ("mesh.rules\x7f=()", "mesh.=1", "=3", "mesh.rules[0].x=3", "mesh rules=1"):
        with pytest.raises(ConfigError, match=r"no such field|has no fields"):
            cli._check_fields(config, [f"--config.{argument}"])
    cli._check_fields(config, ["--config.mesh.rules[0]=1", "--config.mesh.rules=()"])


@pytest.mark.parametrize("alpha", [10**400, 1e300, "8", True])
def test_alpha_of_a_peft_adapter(alpha, tmp_path):
    adapter_files.make_peft(tmp_path)
    edit(tmp_path / "dora/adapter_config.json", lora_alpha=alpha)
    file = tmp_path / "dora/adapter_config.json"
    assert_mistake_of_any_length(
        CheckpointError, lambda: adapter_files.load_peft(file.parent), file
    )


# Data files.


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path / "data"))
    data_files.make_data(tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize("line", [DEEP, MANY_DIGITS, '{"question": "\\ud800", "answer": "#### 1"}'])
def test_lines_of_a_data_file(line, data):
    path = data / "gsm8k/gsm8k/train.jsonl"
    path.write_text(f"{line}\n" * 3)
    assert_mistake(DataError, lambda: data_files.load_data(data / "gsm8k"), path, "lines 1, 2, 3")


def test_a_cell_without_end(data):
    path = data / "banking77/banking77/train.csv"
    path.write_text('text,category\na,b\n"' + "x" * 200_000)
    assert_mistake(DataError, lambda: data_files.load_data(data / "banking77"), path, "field limit")


@pytest.mark.parametrize("facts", [True, 3, "ab", {"a": 1}, [["a"]]])
def test_facts_that_are_no_list(facts, data):
    path = data / "finqa/finqa/test.json"
    rows = json.loads(path.read_text())
    rows[0]["qa"]["model_input"] = facts
    path.write_text(json.dumps(rows))
    assert_mistake(DataError, lambda: data_files.load_data(data / "finqa"), path, "model_input")


def test_a_program_that_names_a_step_of_thousands_of_digits():
    with pytest.raises(ProgramError, match="no earlier step"):
        execute(f"add(#{MANY_DIGITS}, 1)", [])
