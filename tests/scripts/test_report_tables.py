"""The report's tables and sentences, from run directories made by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from scripts import report, report_tables, run_results
from tests.scripts.synthetic_runs import make_run, make_three_runs, router_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_three_runs(tmp_path_factory.mktemp("runs"))


def read_table(text: str) -> dict[str, list[str]]:
    """Rows of the first table in Markdown: label -> cells."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), text.splitlines())
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {label: cells for label, *cells in rows}


def test_the_table_holds_the_numbers_and_marks_the_best(runs):
    table = read_table(report.format_table(runs))
    assert table[""] == ["frozen", "lora", "sira"]
    assert table["trained parameters"] == ["0", "1,000", "3,000"]
    assert table["share of the base's parameters, %"] == ["0.000", "1.000", "3.000"]
    assert table["training steps"] == ["– [1]", "20", "20"]
    assert table["training tokens"] == ["– [1]", "4,096", "4,096"]
    assert table["test loss, nats per target token"] == ["3.000", "**1.000**", "1.250"]
    assert table["mean over tasks: exact match, %"] == ["0.0", "43.8", "**54.7**"]
    assert table["mean over tasks: chrF"] == ["5.0", "55.0", "**67.5**"]
    assert table["cldr_date (2 tasks): exact match, %"] == ["0.0", "50.0", "**62.5**"]
    assert table["cldr_unit: exact match, %"] == [
        "0.0",
        "50.0",
        "**62.5**",
    ]
    assert table["bfcl_simple: AST match, %"] == ["1.0", "51.0", "**63.5**"]
    assert table["seconds per step (median)"] == ["– [1]", "**0.50**", "0.75"]
    assert table["peak memory, GiB"] == ["– [1]", "**1.00**", "2.00"]


def test_notes_give_the_reason_of_a_blank_cell(runs):
    assert "\n[1] frozen: nothing was trained.\n" in report.format_table(runs)


def test_group_scores_are_means_over_tasks(tmp_path):
    directory = make_run(tmp_path / "run")
    path = directory / "evaluation_test.json"
    evaluation = json.loads(path.read_text())
    evaluation["scores"]["cldr_date_te"]["exact_match"] = 20.0
    evaluation["losses"]["test/loss/cldr_date_te"] = 2.0
    path.write_text(json.dumps(evaluation))
    assert read_table(report.format_table({"a": directory}))[
        "cldr_date (2 tasks): exact match, %"
    ] == ["35.0"]
    found = run_results.read_runs({"a": directory})
    languages = run_results.group_languages(found[0].tasks)
    assert languages == {"sw": ["cldr_date_sw", "cldr_unit_sw"], "te": ["cldr_date_te"]}
    rows = report_tables.group_quantities(found, languages, only_primary=False)
    values = {row.label: row.value(found[0]) for row in rows}
    assert values == {
        "sw (2 tasks): loss": 1.0,
        "sw (2 tasks): exact match, %": 50.0,
        "sw (2 tasks): chrF": 55.0,
        "te: loss": 2.0,
        "te: exact match, %": 20.0,
        "te: chrF": 55.0,
    }


def test_the_loss_of_a_single_task_is_the_overall_loss(tmp_path):
    directory = make_run(tmp_path / "run")
    evaluation = {
        "checkpoint": 1,
        "split": "test",
        "examples": {"bfcl_simple": 4},
        "losses": {"test/loss": 0.5},
        "scores": {"bfcl_simple": {"exact_match": 1.0}},
        "mean": {"exact_match": 1.0},
    }
    (directory / "evaluation_test.json").write_text(json.dumps(evaluation))
    found = run_results.read_runs({"a": directory})
    groups = {"bfcl_simple": ["bfcl_simple"]}
    rows = report_tables.group_quantities(found, groups, only_primary=False)
    assert rows[0].value(found[0]) == 0.5


def test_equal_values_are_not_marked(tmp_path):
    runs = {name: make_run(tmp_path / name) for name in ("a", "b")}
    assert "**" not in report.format_table(runs)


def test_verdict_names_each_measure_on_which_sira_does_not_beat_lora(runs):
    text = report.format_table(runs)
    assert (
        "sira does not beat lora on 1 of the 7 measures of the answers"
        " (test loss, nats per target token 1.250 against 1.000); it is ahead on the rest (6)."
    ) in text
    assert (
        "sira has 3.00 times the trained parameters, 1.50 times the time of a step, 2.00 times the"
        " peak memory of lora."
    ) in text
    # Of four examples of each of four tasks lora has 1 right and sira 3.
    assert (
        "On 16 shared examples sira alone matches the target exactly on 8, lora alone on 0: a"
        " difference that chance hardly explains (sign test, p = 0.0078)."
    ) in text


def test_verdict_of_equal_and_of_better_runs(tmp_path):
    equal = {
        "lora": make_run(tmp_path / "lora", method="lora"),
        "sira": make_run(tmp_path / "sira"),
    }
    text = report.format_table(equal)
    assert "sira does not beat lora on 7 of the 7 measures" in text
    assert "it is ahead" not in text
    assert "match the target exactly in the same cases" in text
    better = equal | {"sira": make_run(tmp_path / "better", exact=60.0, loss=0.9)}
    assert "sira beats lora on each of the 7 measures" in report.format_table(better)


def test_verdict_without_such_a_pair_is_empty(runs):
    text = report.format_table({"frozen": runs["frozen"], "lora": runs["lora"]})
    assert "beat" not in text


@pytest.mark.parametrize(
    ("a", "b", "p"), [(0, 5, 2 / 32), (5, 5, 1.0), (1, 0, 1.0), (1, 9, 22 / 1024)]
)
def test_sign_test(a, b, p):
    assert report_tables.sign_test(a, b) == pytest.approx(p)
    assert report_tables.sign_test(b, a) == pytest.approx(p)


def test_different_examples_are_pointed_out(runs, tmp_path):
    other = make_run(tmp_path / "other", method="lora")
    path = other / "evaluation_test.json"
    evaluation = json.loads(path.read_text())
    evaluation["examples"]["bfcl_simple"] = 7
    path.write_text(json.dumps(evaluation))
    text = report.format_table({"sira": runs["sira"], "other": other})
    assert "different examples" in text
    assert "sira 16 examples of 4 tasks; other 19 examples of 4 tasks" in text
    assert "different examples" not in report.format_table(runs)


@pytest.mark.parametrize(
    ("file", "row", "reason"),
    [
        ("summary.json", "trained parameters", "no summary.json"),
        ("summary.json", "seconds per step (median)", "no summary.json"),
        ("evaluation_test.json", "bfcl_simple: AST match, %", "no evaluation_test.json"),
    ],
)
def test_a_missing_file_leaves_cells_blank_with_the_reason(runs, tmp_path, file, row, reason):
    directory = make_run(tmp_path / "run", method="lora", routers=True)
    (directory / file).unlink()
    text = report.format_table({"other": runs["sira"], "run": directory})
    table = read_table(text)
    assert table[row][1] == "– [1]"
    assert table[row][0] != "– [1]"
    assert f"\n[1] run: {reason}." in text


def test_a_missing_number_leaves_its_cell_blank(tmp_path):
    directory = make_run(tmp_path / "run")
    path = directory / "summary.json"
    summary = json.loads(path.read_text())
    del summary["seconds_per_step"]
    path.write_text(json.dumps(summary | {"peak_memory_bytes": math.nan}))
    text = report.format_table({"run": directory})
    assert "run: summary.json has no seconds_per_step." in text
    assert "run: peak memory, GiB is nan." in text


def test_projections_stand_in_the_order_of_a_layer(tmp_path):
    directory = make_run(tmp_path / "run", routers=True)
    (run,) = run_results.read_runs({"run": directory})
    assert [p.name for p in run.router.projections] == ["attention/q", "mlp/down"]
    table = report_tables.router_table(run.router)
    load = np.array(router_report()["projections"]["mlp/down"]["expert_load"])
    assert table.rows[1][0].text == "mlp/down"
    assert table.rows[1][4].text == f"{4 * load.max():.2f}"
