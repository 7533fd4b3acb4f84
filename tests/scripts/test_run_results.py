"""Reading run directories: what is damaged is named."""

import re

import pytest

from scripts import report, run_results
from sira_jax.errors import ConfigError, DataError
from tests.scripts.synthetic_runs import make_run, make_three_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_three_runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("summary.json", '"steps": 20', '"steps": "20"', "steps='20' has the wrong type"),
        ("evaluation_test.json", '"chrf": 55.0', '"chrf": null', "'chrf']=None is no number"),
        ("evaluation_test.json", '"test/loss":', '"loss":', "no 'test/loss'"),
        ("predictions_test.jsonl", '"target"', '"goal"', "line 1: it has no text 'target'"),
        ("router_test.json", '"router_confidence"', '"confidence"', "has no router_confidence"),
        ("router_test.json", '"tasks": [', '"tasks": ["one more",', "has the shape"),
    ],
)
def test_wrong_content_is_named(tmp_path, file, old, new, message):
    directory = make_run(tmp_path / "run", routers=True)
    path = directory / file
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        report.format_table({"run": directory})
    assert str(path) in str(caught.value)


def test_a_torn_last_line_of_the_log_is_left_out(tmp_path):
    directory = make_run(tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "train/lo')
    (run,) = run_results.read_runs({"run": directory})
    assert run.curve("train/loss") == ([10, 20], [1.1, 1.05])
    assert run.curve("validation/loss") == ([20], [1.0])


def test_missing_directories_and_bad_names(runs, tmp_path):
    with pytest.raises(DataError, match="missing: the directory of run 'a' does not exist"):
        report.format_table({"a": tmp_path / "missing"})
    with pytest.raises(ConfigError, match="no runs"):
        report.format_table({})
    for name in ("", "../a", "a b", "_a", "<b>"):
        with pytest.raises(ConfigError, match=re.escape(repr(name))):
            report.format_table({name: runs["lora"]})


@pytest.mark.parametrize(
    ("task", "group", "language"),
    [
        ("cldr_date_sw", "cldr_date", "sw"),
        ("cldr_currency_name_en", "cldr_currency_name", "en"),
        ("bfcl_simple", "bfcl_simple", None),
        ("bfcl_live_simple", "bfcl_live_simple", None),
        ("sw", "sw", None),
        ("task_zz", "task_zz", None),
        ("_sw", "_sw", None),
    ],
)
def test_groups_and_languages(task, group, language):
    assert run_results.split_task(task) == (group, language)
