"""evaluate.py with several adapters on one tiny base, against the same script with each adapter alone."""

import json
import shutil

import numpy as np
import pytest

from sira_jax.adapters.base import PATHS
from sira_jax.errors import ConfigError
from tests.integration.mistakes import assert_mistake, contents
from tests.scripts.adapter_runs import BOTH, CONFIGS, TASKS, make_runner, make_runs

# Each of these loads, decodes and writes: minutes in all.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(runs, monkeypatch, capsys):
    return make_runner(runs, monkeypatch, capsys)


@pytest.fixture
def evaluated(run, tmp_path):
    """Evaluates with several adapters; returns (results, predictions, router report) from the files."""

    def call(*arguments):
        run("evaluate", f"--workdir={tmp_path}", *arguments)
        lines = (tmp_path / "predictions_test.jsonl").read_text().splitlines()
        router = tmp_path / "router_test.json"
        return (
            json.loads((tmp_path / "evaluation_test.json").read_text()),
            [json.loads(line) for line in lines],
            json.loads(router.read_text()) if router.exists() else None,
        )

    return call


def test_each_task_with_its_adapter(evaluated, run, runs, tmp_path):
    alone = {}
    for name in CONFIGS:
        copy = shutil.copytree(runs / name, tmp_path / f"copy_{name}")
        run("evaluate", f"--workdir={copy}")
        records = (copy / "predictions_test.jsonl").read_text().splitlines()
        results = json.loads((copy / "evaluation_test.json").read_text())
        alone[name] = (results, [json.loads(line) for line in records])
    assert [r["prediction"] for r in alone["lora"][1]] != [
        r["prediction"] for r in alone["sira"][1]
    ]

    results, predictions, router = evaluated(BOTH, "--assign=*_sw=s,cldr_*=l")
    assert results["assigned"] == {"cldr_number_en": "l", "cldr_relative_sw": "s"}
    assert results["examples"] == dict.fromkeys(TASKS, 3)
    assert results["checkpoint"] == "best"
    for name, own in (("l", "lora"), ("s", "sira")):
        source = results["adapters"][name]
        assert source["directory"] == f"{runs}/{own}"
        assert source["checkpoint"] == 2
        assert CONFIGS[own].items() <= source["adapter"].items()
    by_task = dict(zip(TASKS, CONFIGS, strict=True))
    assert predictions == [
        record for task in TASKS for record in alone[by_task[task]][1] if record["task"] == task
    ]
    for task, name in by_task.items():
        assert results["scores"][task] == alone[name][0]["scores"][task]
        for loss in (f"test/loss/{task}", f"test/accuracy/{task}"):
            np.testing.assert_allclose(
                results["losses"][loss], alone[name][0]["losses"][loss], rtol=1e-5
            )
    # The router of the one that has one saw the tokens of its own task alone.
    tokens = np.asarray(router["projections"]["s/attention/q"]["task_tokens"])
    assert set(router["projections"]) == {f"s/{path}" for path in PATHS}
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1] > 0).all()


def test_the_base_and_an_adapter_folder(evaluated, run, runs, tmp_path):
    config = tmp_path / "config.py"
    experiment = json.loads((runs / "lora/config.json").read_text())["config"]
    config.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({experiment!r})\n"
    )
    results, predictions, router = evaluated(
        "--adapters=f={0}/folder", f"--config={config}", "--assign=cldr_number_en=f,*=base"
    )
    assert router is None
    assert results["adapters"]["f"]["checkpoint"] is None
    frozen = shutil.copytree(runs / "lora", tmp_path / "frozen")
    run("evaluate", f"--workdir={frozen}", "--checkpoint=none")
    expected = [json.loads(r) for r in (frozen / "predictions_test.jsonl").read_text().splitlines()]
    same = [a == b for a, b in zip(predictions, expected, strict=True)]
    assert same[3:] == [True] * 3
    assert not all(same[:3])


ASSIGNMENTS = [
    ([BOTH], "task cldr_number_en has no adapter"),
    ([BOTH, "--assign=*_sw=s"], "task cldr_number_en has no adapter", "*=NAME"),
    ([BOTH, "--assign=*=x"], "--assign: adapter 'x'", "l, s, base"),
    ([BOTH, "--assign=cldr_nubmer_en=l,*=s"], "'cldr_nubmer_en' fits none of the tasks cldr_number_en"),
    ([BOTH, "--assign=l"], "--assign: 'l' is not allowed: TASK=NAME"),
    (["--assign=*=l"], "--assign needs --adapters"),
    ([BOTH, "--assign=*=l", "--checkpoint=none"], "--checkpoint=none"),
    ([BOTH, "--assign=*=l", "--workdir={0}/lora"], "lora: is one run's"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), [(a, named) for a, *named in ASSIGNMENTS])
def test_wrong_assignments(arguments, named, run):
    before = contents(run.folder)
    assert_mistake(ConfigError, lambda: run("evaluate", *arguments), *named)
    assert contents(run.folder) == before
