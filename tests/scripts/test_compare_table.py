"""Intervals against tables of Student's t, and what the table says of runs that are there and that are not."""

import itertools
import json
import math

import pytest

from scripts import compare_table
from scripts.compare_figure import draw, spread
from scripts.compare_report import render, write_comparison
from scripts.compare_runs import COSTS_FILE, first_experiments, save_plan
from scripts.compare_table import interval, student_t
from scripts.report_page import markdown_table
from sira_jax.errors import DataError
from tests.scripts.comparisons import sizes, specs, write_result

# 97.5% points, from the printed tables.
T_975 = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    9: 2.2622,
    10: 2.2281,
    30: 2.0423,
    120: 1.9799,
}
T_995 = {1: 63.6567, 2: 9.9248, 5: 4.0321, 10: 3.1693}


def test_student_t_is_that_of_the_tables():
    for degrees, expected in T_975.items():
        assert student_t(degrees) == pytest.approx(expected, abs=6e-5)
    for degrees, expected in T_995.items():
        assert student_t(degrees, 0.99) == pytest.approx(expected, abs=6e-5)


def test_intervals_by_hand():
    # 1, 2, 3, 4: variance 5/3, standard error sqrt(5/12), three degrees of freedom.
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.18245 * math.sqrt(5 / 12), rel=1e-5)
    assert found.show(2) == "2.50 ± 2.05"
    assert interval([7.0, 9.0]).half == pytest.approx(12.7062, rel=1e-5)
    assert interval([3.0]).half is None
    assert interval([3.0]).show(1) == "3.0"


COSTS = {
    "lora": {
        "flops_per_token": 2e6,
        "bytes_per_token": 3e4,
        "scratch_bytes": 1000,
        "seconds": [1.0, 2.0, 4.0],
    },
    "sira": {
        "flops_per_token": 5e6,
        "bytes_per_token": 6e4,
        "scratch_bytes": 1500,
        "seconds": [2.0, 3.0, 9.0],
    },
}


@pytest.fixture
def runs(tmp_path):
    """LoRA with two seeds, SiRA with one and a failure, the frozen model."""
    by_method = specs(tmp_path, ("none", "lora", "sira"))
    write_result(by_method["none"][0], 5.0, exact_match=0.0)
    write_result(by_method["lora"][0], 1.0, peak=100, exact_match=10.0)
    write_result(by_method["lora"][1], 2.0, peak=200, exact_match=14.0)
    write_result(by_method["sira"][0], 1.5, peak=150, exact_match=11.0)
    failed = by_method["sira"][1]
    failed.directory.mkdir(parents=True)
    (failed.directory / "failure.json").write_text('{"reason": "it was unlucky"}')
    return by_method


def rows_of(by_method, costs=COSTS):
    return compare_table.make_rows(by_method, sizes(tuple(by_method)), costs)


def test_rows(runs):
    frozen, lora, sira = rows_of(runs)
    assert (frozen.label, lora.label, sira.label) == ("frozen", "lora", "sira")
    assert lora.quality["loss"].values == (1.0, 2.0)
    assert lora.quality["exact_match"].mean == 12.0
    assert (lora.seeds, lora.missing) == ((0, 1), {})
    assert (
        lora.costs["time_ratio"] == lora.costs["scratch_ratio"] == lora.costs["memory_ratio"] == 1
    )
    assert sira.costs["time_ratio"] == 2.0  # the median of 2, 1.5 and 2.25
    assert sira.costs["scratch_ratio"] == 1.5
    assert sira.costs["memory_ratio"] == 1.5  # over the seed that both have
    assert (sira.seeds, sira.missing) == ((0,), {1: "it was unlucky"})
    assert sira.quality["loss"].half is None
    assert set(frozen.costs.values()) == {"nothing was trained"}


def test_a_missing_run_is_a_blank_with_its_reason(runs):
    table = compare_table.to_table(rows_of(runs), "test")
    text = markdown_table(table)
    frozen, lora, sira = ([cell.text for cell in row] for row in table.rows)
    assert lora[:6] == ["lora", "as configured", "2 of 2", "2,000", "+100.0", "1,000"]
    assert lora[6:8] == ["1.500 ± 6.353", "12.0 ± 25.4"]
    assert lora[8:] == ["2.00", "30", "1.00", "1.00", "1.00"]
    assert sira[1:3] == ["rank=1, alpha=2", "1 of 2 [2]"]
    assert sira[6:8] == ["1.500", "11.0"]
    assert frozen[8] == "– [1]"
    assert "[2] sira: seed 1: it was unlucky." in text
    assert "[1] frozen: nothing was trained." in text


def test_methods_without_any_run_or_cost(tmp_path):
    by_method = specs(tmp_path)
    write_result(by_method["lora"][0], 1.0, chrf=3.0)
    _, sira = rows_of(by_method, {"lora": COSTS["lora"]})
    assert sira.quality == {"loss": "was not run yet", "chrf": "was not run yet"}
    assert sira.costs["memory_ratio"] == "was not run yet"
    assert (
        sira.costs["time_ratio"] == "the step's cost was not measured, which follows the first run"
    )
    lora, _ = rows_of(by_method, "there is no costs.json")
    assert lora.costs["flops_per_token"] == "there is no costs.json"
    # What several methods lack for one reason is one note.
    notes = compare_table.to_table(rows_of(by_method, "there is no costs.json"), "test").notes
    assert notes == [
        "[1] lora, sira: seed 1: was not run yet.",
        "[2] lora, sira: there is no costs.json.",
        "[3] sira: seed 0: was not run yet.",
        "[4] sira: was not run yet.",
    ]
    assert lora.costs["memory_ratio"] == 1


def test_without_the_baseline_there_are_no_ratios(tmp_path):
    by_method = specs(tmp_path, ("sira",))
    write_result(by_method["sira"][0], 1.0, chrf=3.0)
    (sira,) = rows_of(by_method, {"sira": COSTS["sira"]})
    assert sira.costs["flops_per_token"] == 5e6
    assert sira.costs["time_ratio"] == "the costs of lora were not measured"
    assert sira.costs["memory_ratio"] == "no run of lora with the same seed"


def test_a_loss_that_is_not_finite(tmp_path):
    by_method = specs(tmp_path, ("lora",))
    write_result(by_method["lora"][0], math.nan, chrf=3.0)
    write_result(by_method["lora"][1], 1.0, chrf=3.0)
    (lora,) = rows_of(by_method)
    assert lora.quality["loss"] == "loss is not a finite number with every seed"
    assert lora.quality["chrf"].mean == 3.0


def test_the_report_comes_from_the_directory_alone(runs, tmp_path, capsys):
    settings = {"budget": "rank", "rank": 4, "seeds": [0, 1], "sizes": sizes(tuple(runs))}
    save_plan(tmp_path, settings, runs)
    first = first_experiments([runs["lora"][0], runs["sira"][0]])
    (tmp_path / COSTS_FILE).write_text(json.dumps({"experiments": first, "methods": COSTS}))
    rows = write_comparison(tmp_path)
    assert [row.method for row in rows] == ["none", "lora", "sira"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert result["rows"][1]["quality"]["loss"]["values"] == [1.0, 2.0]
    assert [(run["method"], run["seed"]) for run in result["runs"]] == [
        ("none", 0),
        ("lora", 0),
        ("sira", 0),
        ("lora", 1),
        ("sira", 1),
    ]
    assert result["runs"][4]["failure"] == "it was unlucky"
    assert result["versions"]["jax"]
    page = (tmp_path / "comparison.md").read_text()
    assert "1.500 ± 6.353" in page
    assert "1.500 ± 6.353" in capsys.readouterr().out
    # Costs of another experiment do not count.
    first["sira"]["adapter"]["rank"] = 9
    (tmp_path / COSTS_FILE).write_text(json.dumps({"experiments": first, "methods": COSTS}))
    rows = write_comparison(tmp_path)
    assert rows[1].costs["flops_per_token"] == 2e6
    assert isinstance(rows[2].costs["flops_per_token"], str)


def test_a_directory_without_a_comparison(tmp_path):
    with pytest.raises(DataError, match=r"plan\.json: there is no comparison"):
        write_comparison(tmp_path)


def test_the_picture_of_methods_without_results(tmp_path):
    assert draw(rows_of(specs(tmp_path)), "test").startswith(b"\x89PNG")


def test_labels_keep_apart_and_in_order():
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    places = spread([0.1, 0.12, 0.13, 0.5, 0.52, 0.99, 1.0], 0.06)
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert min(gaps) >= 0.06 - 1e-9
    assert max(places) <= 1 + 1e-9
    # 0.99 and 1 become 0.965 and 1.025, and everything goes down by what is too high.
    assert places[3:5] == pytest.approx([0.48 - 0.025, 0.54 - 0.025])


def test_table_and_picture_can_be_made_from_the_json_alone(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    by_method = specs(first)
    save_plan(first, {"budget": "rank", "rank": 4, "seeds": [0, 1], "sizes": sizes()}, by_method)
    write_result(by_method["lora"][0], loss=1.0, chrf=50.0)
    write_result(by_method["lora"][1], loss=2.0, chrf=70.0)
    write_comparison(first)
    again.mkdir()
    path = again / "results.json"
    path.write_bytes((first / "comparison.json").read_bytes())
    render(path)
    table = (first / "comparison.md").read_text().replace("comparison.png", "results.png")
    assert (again / "results.md").read_text() == table
    assert (again / "results.png").read_bytes() == (first / "comparison.png").read_bytes()
    for text in ("", "[]", '{"rows": []}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"is no comparison\.json"):
            render(path)
    with pytest.raises(DataError, match="No such file"):
        render(again / "none.json")
