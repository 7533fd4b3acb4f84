"""Tables from run directories made by hand: cells, gaps with reasons, paired tests, LaTeX, CSV and the page."""

import csv
import json
import math
import re

import pytest

from scripts import table_cells
from scripts.table_cells import find_trials, make_grid, score_by, variant_labels
from scripts.table_formats import to_latex, to_table
from scripts.table_tests import p_value, paired_tests
from sira_jax.errors import ConfigError, DataError
from tests.scripts.adapter_runs import make_runner
from tests.scripts.comparisons import experiment
from tests.scripts.flagged import imported
from tests.scripts.table_runs import make_trial

DATE = {"cldr_date_sw": 40.0}
NUMBER = {"cldr_number_en": 60.0}
SEEDS = (0, 1, 2)


def shifted(scores, by):
    return {task: value + by for task, value in scores.items()}


@pytest.fixture
def make_tables():
    with imported("make_tables") as module:
        yield module


@pytest.fixture
def single(tmp_path):
    """Two tasks; the base once, lora and sira with three seeds; sira's third seed on numbers failed."""
    root = tmp_path / "runs"
    for name, scores in (("date", DATE), ("number", NUMBER)):
        make_trial(root / name / "none", "none", 0, shifted(scores, -30))
        for seed in SEEDS:
            make_trial(root / name / f"lora{seed}", "lora", seed, shifted(scores, seed), loss=2.0)
            # Ahead by 5, 6 and 8 on dates.
            gain = 5 + seed + (seed == 2)
            directory = root / name / f"sira{seed}"
            make_trial(directory, "sira", seed, shifted(scores, seed + gain), loss=1.5)
    failed = root / "number" / "sira2"
    (failed / "evaluation_test.json").unlink()
    (failed / "failure.json").write_text(json.dumps({"reason": "train.py ended: 5 < 6 & no_luck"}))
    return root


def run_script(tmp_path, monkeypatch, capsys, *arguments):
    call = make_runner(tmp_path, monkeypatch, capsys)
    return call("make_tables", f"--out={tmp_path / 'out'}", *arguments)


def read_csv(path):
    with path.open() as file:
        return {(x["row"], x["column"]): x for x in csv.DictReader(file) if x["unit"][0] == "s"}


def test_single_tasks(single, tmp_path, monkeypatch, capsys):
    out = run_script(tmp_path, monkeypatch, capsys, f"--runs={single}", "--kind=single")
    cells = read_csv(tmp_path / "out" / "single.csv")
    lora = cells["lora", "cldr_date_sw"]
    # 40, 41, 42: deviation 1, t with 2 degrees of freedom 4.302653.
    assert (lora["mean"], lora["runs"]) == ("41.0", "3")
    assert float(lora["half_95"]) == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-8)
    assert lora["values_by_seed"] == "0:40.0 1:41.0 2:42.0"
    assert float(lora["trained_share_percent"]) == 1.0
    assert float(cells["base", "cldr_date_sw"]["trained_share_percent"]) == 0.0
    gap = cells["sira", "cldr_number_en"]
    assert (gap["mean"], gap["runs"]) == ("66.0", "2")
    assert gap["missing"] == "seed 2: train.py ended: 5 < 6 & no_luck"
    # The mean over the columns is of seeds that have both.
    assert cells["sira", "mean"]["values_by_seed"] == "0:55.0 1:57.0"
    assert cells["lora", "mean"]["mean"] == "51.0"
    records = json.loads((tmp_path / "out" / "single.json").read_text())
    assert len(records) == 2 * 3 * 3  # scores and losses
    (record,) = [x for x in records[:9] if (x["row"], x["column"]) == ("sira", "cldr_number_en")]
    assert (record["mean"], record["values_by_seed"]) == (66.0, {"0": 65.0, "1": 67.0})
    assert record["missing"] == {"2": "train.py ended: 5 < 6 & no_luck"}
    assert [x["half_95"] for x in records if x["row"] == "base"] == [None] * 6
    assert re.search(r"\| base +\| +0\.000 \| +2 of 2 \| +10\.0 \| +30\.0 \| +20\.0 \|", out)
    assert re.search(r"\| sira +\| +3\.000 \| 5 of 6 \[1\] \| \*\*47\.3 ± ", out)
    assert "[1] sira: cldr_number_en, seed 2: train.py ended: 5 &lt; 6 &amp; no_luck." in out


def test_the_pages_files(single, tmp_path, monkeypatch, capsys):
    run_script(tmp_path, monkeypatch, capsys, f"--runs={single}", "--title=A & B")
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    figures = {"single_parameters.png", "single_curves.png"}
    assert names == figures | {
        f"single.{suffix}" for suffix in ("md", "tex", "csv", "json", "html")
    }
    page = (folder / "single.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<h1>A &amp; B</h1>" in page
    assert "http" not in page
    assert "sira – lora" in page
    # Both of scores and of losses.
    text = (folder / "single.tex").read_text()
    assert text.count(r"\toprule") == 2
    assert r"cldr\_number\_en, seed 2: train.py ended: 5 \textless{} 6 \& no\_luck." in text


def test_methods_can_be_chosen(single, tmp_path, monkeypatch, capsys):
    out = run_script(tmp_path, monkeypatch, capsys, f"--runs={single}", "--methods=sira,lora")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert rows == ["method", "-" * 6, "sira", "lora"]
    with pytest.raises(
        DataError, match=r"adamix: no run has one of them; there are lora, none, sira"
    ):
        run_script(tmp_path, monkeypatch, capsys, f"--runs={single}", "--methods=adamix")


def test_planned_runs_are_gaps(single):
    planned = experiment("sira", 7, data={"tasks": ["cldr_date_sw"]})
    plan = {
        "sweep": "x.py",
        "same": {},
        "runs": [
            {"name": "new", "config": "c", "overrides": {}, "experiment": planned.to_dict()},
        ],
    }
    (single / "sweep.json").write_text(json.dumps(plan))
    begun = single / "begun"
    begun.mkdir()
    fields = {"config": experiment("lora", 9).to_dict()}
    (begun / "config.json").write_text(json.dumps(fields))
    reasons = {t.directory.name: t.reason for t in find_trials([single]) if t.run is None}
    assert reasons["new"] == "was not run yet"
    assert reasons["begun"] == "is not finished"
    assert len(reasons) == 3


def multi(root, gains=None):
    """A mixture of two groups and two languages: sira gains 2 points on Swahili."""
    base = {"cldr_date_sw": 10.0, "cldr_date_te": 20.0, "cldr_unit_sw": 30.0, "bfcl_simple": 80.0}
    for seed in SEEDS:
        scores = {task: value + seed for task, value in base.items()}
        make_trial(root / f"l{seed}", "lora", seed, scores, tasks=("mixed",))
        scores = {task: x + 2 * task.endswith("sw") for task, x in scores.items()}
        make_trial(root / f"s{seed}", "sira", seed, scores, tasks=("mixed",))
    return root


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("multilingual", {"Swahili (sw)": 21.0, "Telugu (te)": 21.0, "mean": 36.0}),
        ("multitask", {"cldr_date": 16.0, "cldr_unit": 31.0, "bfcl_simple": 81.0, "mean": 36.0}),
    ],
)
def test_mixtures_are_cut_by_language_and_by_task(tmp_path, monkeypatch, capsys, kind, columns):
    root = multi(tmp_path / "runs")
    run_script(tmp_path, monkeypatch, capsys, f"--runs={root}", f"--kind={kind}")
    cells = read_csv(tmp_path / "out" / f"{kind}.csv")
    found = {column: float(x["mean"]) for (row, column), x in cells.items() if row == "lora"}
    assert found == pytest.approx(columns)
    gains = {"Swahili (sw)": 2.0, "cldr_date": 1.0, "cldr_unit": 2.0, "mean": 1.0}
    for column, value in columns.items():
        assert float(cells["sira", column]["mean"]) == pytest.approx(value + gains.get(column, 0.0))


def test_the_seeds_of_a_cell_differ_in_nothing_else(tmp_path, make_tables):
    make_trial(tmp_path / "a", "lora", 0, DATE)
    make_trial(tmp_path / "b", "lora", 1, DATE, optimizer={"learning_rate": 0.5})
    with pytest.raises(
        DataError, match=r"a and .*b, both lora on .*: optimizer\.learning_rate=0\.001 and 0\.5"
    ):
        make_tables._tables(find_trials([tmp_path]), "single")


def test_a_seed_counts_once(tmp_path, make_tables):
    make_trial(tmp_path / "a", "lora", 0, DATE)
    make_trial(tmp_path / "b", "lora", 0, DATE, train={"log_every": 3})
    with pytest.raises(DataError, match=r"have the same seed 0: leave one out"):
        make_tables._tables(find_trials([tmp_path]), "single")


@pytest.mark.parametrize("field", ["scores", "losses"])
def test_values_that_are_no_number_are_gaps(tmp_path, make_tables, field):
    for seed in SEEDS:
        make_trial(tmp_path / f"{seed}", "sira", seed, DATE)
        make_trial(tmp_path / f"lora{seed}", "lora", seed, DATE)
    path = tmp_path / "1" / "evaluation_test.json"
    results = json.loads(path.read_text())
    (name,) = DATE
    results["scores"][name]["exact_match"] = math.nan if field == "scores" else 40.0
    results["losses"]["test/loss"] = math.nan if field == "losses" else 1.0
    path.write_text(json.dumps(results))
    ((_, grids, _),) = make_tables._tables(find_trials([tmp_path]), "single")
    grid = grids[field == "losses"]
    (sira,) = [row for row in grid.rows if row.method == "sira"]
    assert sorted(sira.cells[name].values) == [0, 2]
    assert sira.cells[name].missing == {1: "has no finite value of it"}
    assert all(len(test.difference.values) == 2 for test in paired_tests(grid, sira))


def test_why_a_run_is_no_result(tmp_path):
    made = {name: tmp_path / name for name in ("torn", "other", "untrained", "begun")}
    for seed, directory in enumerate(made.values()):
        make_trial(directory, "lora", seed, DATE)
    results = {name: directory / "evaluation_test.json" for name, directory in made.items()}
    results["torn"].write_text(results["torn"].read_text()[:40])
    changed = json.loads(results["other"].read_text())
    changed["experiment"]["evaluate"]["examples_per_task"] = 7
    results["other"].write_text(json.dumps(changed))
    (made["untrained"] / "summary.json").unlink()
    results["begun"].unlink()
    assert {t.directory.name: t.reason for t in find_trials([tmp_path])} == {
        "torn": "evaluation_test.json is damaged",
        "other": "evaluation_test.json is of another experiment",
        "untrained": "its training is not finished",
        "begun": "is not finished",
    }


def test_a_root_may_lie_in_a_directory_of_checkpoints(tmp_path):
    root = tmp_path / "checkpoints" / "tables"
    make_trial(root / "a", "lora", 0, DATE)
    assert [trial.directory for trial in find_trials([root])] == [root / "a"]


def test_variants_of_a_method_are_rows(tmp_path):
    for rank in (2, 4):
        make_trial(tmp_path / f"{rank}", "sira", 0, DATE, adapter={"rank": rank})
    make_trial(tmp_path / "lora", "lora", 0, DATE)
    trials = find_trials([tmp_path])
    label = variant_labels(trials)
    assert {label(trial) for trial in trials} == {"lora", "sira (rank=2)", "sira (rank=4)"}


def test_ablations(tmp_path, monkeypatch, capsys, make_tables):
    root = tmp_path / "runs"
    make_trial(root / "base", "none", 0, DATE)
    for seed in SEEDS:
        for k in (1, 2, 4):
            fields = {"num_selected_experts": k}
            make_trial(root / f"k{k}{seed}", "sira", seed, shifted(DATE, k + seed), adapter=fields)
        for rank in (4, 8):
            fields = {"rank": rank, "alpha": 2.0 * rank}
            make_trial(root / f"r{rank}{seed}", "lora", seed, shifted(DATE, rank), adapter=fields)
        for regularizer in ("none", ["load_balance"]):
            fields = {"num_selected_experts": 2, "router_regularizer": regularizer}
            name = f"{len(regularizer)}{seed}"
            make_trial(root / name, "sira", seed, shifted(DATE, 20), adapter=fields)
    run_script(tmp_path, monkeypatch, capsys, f"--runs={root}", "--kind=ablations")
    with (tmp_path / "out" / "ablations.csv").open() as file:
        lines = [x for x in csv.DictReader(file) if x["unit"][0] == "s"]
    # With one task group there is no mean besides.
    assert {line["column"] for line in lines} == {"cldr_date"}
    tables = {}
    for line in lines:
        tables.setdefault(line["table"], {})[line["row"]] = float(line["mean"])
    assert tables == {
        "sira: num_selected_experts on cldr_date_sw": {
            "base": 40.0,
            "num_selected_experts = 1": 42.0,
            "num_selected_experts = 2": 43.0,
            "num_selected_experts = 4": 45.0,
        },
        "lora: rank on cldr_date_sw": {"base": 40.0, "rank = 4": 44.0, "rank = 8": 48.0},
        "sira: router_regularizer on cldr_date_sw": {
            "base": 40.0,
            "router_regularizer = load_balance": 60.0,
            "router_regularizer = load_balance + expert_dropout": 43.0,
            "router_regularizer = none": 60.0,
        },
    }
    shares = {x["row"]: float(x["trained_share_percent"]) for x in lines if x["method"] == "lora"}
    assert shares == {"rank = 4": 1.0, "rank = 8": 2.0}
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert "ablation_rank_0_score.png" in pictures
    assert len(pictures) == 6
    with pytest.raises(
        DataError, match=r"--vary=adapter\.dropout_rate: no method has runs with two"
    ):
        make_tables._ablations(find_trials([root]), ["adapter.dropout_rate"])


def test_the_values_of_an_ablation_ascend(tmp_path, make_tables, monkeypatch):
    """Whatever the directories are called; None, without a limit, is last."""
    for capacity in (10.0, 2.0, None, 0.5):
        fields = {"capacity_factor": capacity}
        make_trial(tmp_path / f"c{capacity}", "sira", 0, DATE, adapter=fields)
    drawn = []
    monkeypatch.setattr(
        "scripts.table_figures.ablation", lambda grids, field, values: drawn.append([*values])
    )
    ((_, grids, _),) = make_tables._ablations(find_trials([tmp_path]), ["adapter.capacity_factor"])
    labels = [f"capacity_factor = {value}" for value in (0.5, 2, 10, None)]
    assert drawn == [labels, labels]
    assert [row.label for row in grids[0].rows] == labels


def test_the_values_of_an_ablation_are_named_as_in_its_table(tmp_path, make_tables, monkeypatch):
    for regularizer in (("none",), ("load_balance", "expert_dropout")):
        fields = {"router_regularizer": regularizer}
        make_trial(tmp_path / f"{len(regularizer)}", "sira", 0, DATE, adapter=fields)
    figures = []
    monkeypatch.setattr("scripts.table_figures.to_png", figures.append)
    make_tables._ablations(find_trials([tmp_path]), ["adapter.router_regularizer"])
    ticks = [tick.get_text() for tick in figures[0].axes[0].get_xticklabels()]
    assert ticks == ["load_balance\n+ expert_dropout", "none"]


def test_an_ablations_runs_differ_in_the_field_alone(tmp_path, make_tables):
    for rank, rate in ((2, 1e-3), (4, 1e-2)):
        fields = {"rank": rank, "alpha": 2.0 * rank}
        directory = tmp_path / f"{rank}"
        make_trial(directory, "lora", 0, DATE, adapter=fields, optimizer={"learning_rate": rate})
    with pytest.raises(
        DataError,
        match=r"2 and .*4, both lora, differ in more than adapter\.rank .*: optimizer\.learning_rate=",
    ):
        make_tables._ablations(find_trials([tmp_path]), make_tables.VARIED)


def test_mistakes_in_names(single, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"--against='sria' is not allowed: one of .*sira"):
        run_script(tmp_path, monkeypatch, capsys, f"--runs={single}", "--against=sria")
    with pytest.raises(ConfigError, match=r"--vary='adapter\.rnk' is not allowed: .*adapter\.rank"):
        run_script(
            tmp_path,
            monkeypatch,
            capsys,
            f"--runs={single}",
            "--kind=ablations",
            "--vary=adapter.rank,adapter.rnk",
        )
    assert not (tmp_path / "out").exists()


def test_paired_tests(single):
    grid = make_grid(
        "t",
        "score, %",
        "higher",
        find_trials([single / "date"]),
        lambda trial: trial.method,
        lambda trial, key: key,
        score_by("single"),
    )
    (sira,) = [row for row in grid.rows if row.method == "sira"]
    tests = {test.other: test for test in paired_tests(grid, sira)}
    # 5, 6 and 8: mean 19/3, variance 7/3; t = 19/3 / sqrt(7/9) with 2 degrees of freedom, whose
    # distribution has the closed form P(|T| < t) = t / sqrt(t^2 + 2).
    t = 19 / 3 / math.sqrt(7 / 9)
    assert tests["lora"].difference.mean == pytest.approx(19 / 3)
    assert tests["lora"].p == pytest.approx(1 - t / math.sqrt(t**2 + 2), abs=1e-12)
    # The base pairs with every seed: 45 - 10, 47 - 10, 50 - 10.
    assert tests["none"].difference.values == (35.0, 37.0, 40.0)
    assert tests["lora"].adjusted == pytest.approx(max(2 * tests["none"].p, tests["lora"].p))
    assert tests["lora"].p > tests["none"].p
    assert p_value([1.0]) is None
    assert p_value([1.0, 1.0]) is None
    assert p_value([-1.0, 1.0]) == pytest.approx(1.0)


def test_latex_rows_are_whole(single, make_tables):
    trials = find_trials([single / "date"])
    (_, grids, _), *_ = make_tables._tables(trials, "single")
    lines = to_latex(to_table(grids[0]), "c").splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 3
    assert all(line.count(" & ") == 3 and line.endswith(r" \\") for line in body)
    assert sum(r"\textbf{" in line for line in body) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: is damaged"),
        ('{"config": {"model": 3}}', r"config\.json: is damaged or of another version: "),
    ],
)
def test_damaged_runs(tmp_path, text, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(text)
    with pytest.raises(DataError, match=message):
        find_trials([tmp_path])


def test_there_must_be_runs(tmp_path):
    with pytest.raises(DataError, match="there is no run directory in it"):
        find_trials([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        find_trials([tmp_path / "no"])


def test_languages_have_names():
    parts = table_cells._parts("multilingual", ["cldr_date_te", "cldr_date_sw", "bfcl_simple"])
    assert parts == {"Swahili (sw)": ["cldr_date_sw"], "Telugu (te)": ["cldr_date_te"]}
