"""The report, from run directories made by hand."""

import base64
import html.parser
import itertools
import json
import math
import re
import subprocess
import sys
import warnings as python_warnings
from pathlib import Path

import numpy as np
import pytest

from scripts import figures, report, report_tables, run_results
from scripts.report_page import markdown
from sira_jax.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parents[2]
TASKS = ("cldr_date_sw", "cldr_date_te", "cldr_unit_sw", "bfcl_simple")
TARGETS = {
    "cldr_date_sw": "Jumatatu, 30 Julai 2001",
    "cldr_date_te": "13 జూన్ 1963, గురువారం",
    "cldr_unit_sw": "siku <2.5> & *| _x_",
    "bfcl_simple": "area(base=10, height=5)",
}
HOSTILE = "<script>alert('$5')</script> & *bold* | `code`\nsecond line"
FILES = (
    "metrics.jsonl",
    "summary.json",
    "evaluation_test.json",
    "predictions_test.jsonl",
    "router_test.json",
)


def make_run(
    directory: Path,
    *,
    method: str = "sira",
    exact: float = 50.0,
    loss: float = 1.0,
    right: int = 2,
    routers: bool = False,
) -> Path:
    """A run that answers the first `right` of four examples of each task with the target."""
    directory.mkdir(parents=True)
    scores = {task: {"exact_match": exact, "chrf": exact + 5} for task in TASKS[:3]}
    scores["bfcl_simple"] = {"exact_match": exact / 2, "ast_match": exact + 1}
    evaluation = {
        "checkpoint": "none" if method == "frozen" else 20,
        "split": "test",
        "examples": dict.fromkeys(TASKS, 4),
        "losses": {"test/loss": loss, **{f"test/loss/{task}": loss for task in TASKS}},
        "scores": scores,
        "mean": {"exact_match": 0.875 * exact, "chrf": exact + 5, "ast_match": exact + 1},
    }
    (directory / "evaluation_test.json").write_text(json.dumps(evaluation))
    records = [
        {
            "task": task,
            "input": f"example {i}: {HOSTILE}",
            "target": TARGETS[task],
            "prediction": TARGETS[task] if i < right else HOSTILE,
        }
        for task in TASKS
        for i in range(4)
    ]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (directory / "predictions_test.jsonl").write_text("".join(lines), "utf-8")
    if method == "frozen":
        return directory
    summary = {
        "method": method,
        "trained_parameters": 3000 if routers else 1000,
        "base_parameters": 100_000,
        "seconds_per_step": 0.75 if routers else 0.5,
        "peak_memory_bytes": 2**31 if routers else 2**30,
        "steps": 20,
        "tokens": 4096.0,
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "train/loss": loss + 1 / step} for step in (10, 20)]
    lines += [{"step": 20, "validation/loss": loss}, {"step": 20, "train/loss": None}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if routers:
        (directory / "router_test.json").write_text(json.dumps(router_report()))
    return directory


def router_report(tasks=TASKS, layers=3, experts=4, by_task=True, seed=0) -> dict:
    """Consistent statistics: the load of all tasks is the mean of the tasks' by their tokens."""
    rng = np.random.default_rng(seed)
    projections = {}
    for name in ("mlp/down", "attention/q"):
        load_LZE = rng.dirichlet(np.ones(experts), (layers, len(tasks)))
        tokens_Z = rng.integers(1, 50, len(tasks)).astype(float)
        statistics = {
            "expert_load": np.average(load_LZE, axis=1, weights=tokens_Z),
            "gate_entropy": rng.uniform(0, math.log(experts), layers),
            "dropped_share": rng.uniform(0, 0.2, layers),
            "router_confidence": rng.uniform(1 / experts, 1, layers),
        }
        if by_task:
            statistics["task_expert_load"] = load_LZE
            statistics["task_gate_entropy"] = rng.uniform(0, 1, (layers, len(tasks)))
            statistics["task_tokens"] = np.tile(tokens_Z, (layers, 1))
        projections[name] = {key: value.tolist() for key, value in statistics.items()}
    return {"tasks": list(tasks), "projections": projections}


def read_table(text: str) -> dict[str, list[str]]:
    """Rows of the first table in Markdown: label -> cells."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), text.splitlines())
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {label: cells for label, *cells in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "frozen": make_run(root / "frozen", method="frozen", exact=0.0, loss=3.0, right=0),
        "lora": make_run(root / "lora", method="lora", exact=50.0, loss=1.0, right=1),
        "sira": make_run(root / "sira", exact=62.5, loss=1.25, right=3, routers=True),
    }


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The directory of the report of `runs`."""
    out = tmp_path_factory.mktemp("out") / "deep" / "report"
    with python_warnings.catch_warnings():
        # Matplotlib warns of glyphs that its font lacks and of ranges that are empty.
        python_warnings.simplefilter("error", UserWarning)
        path = report.write_report(out, runs, title="Title <&>")
    assert path == out / "report.html"
    return out


def test_files_of_a_report(page):
    assert {path.name for path in page.iterdir()} == {
        "report.html",
        "report.md",
        "overview.png",
        "learning_curves.png",
        "expert_load_sira.png",
        "gate_entropy_sira.png",
        "task_routing_sira.png",
    }


def test_html_embeds_every_figure_and_refers_to_nothing_else(page):
    text = (page / "report.html").read_text("utf-8")
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    pngs = {path.read_bytes() for path in page.glob("*.png")}
    assert all(png.startswith(b"\x89PNG") for png in pngs)
    assert {base64.b64decode(image) for image in found} == pngs
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script|<link', text)


def test_html_is_well_formed(page):
    class Checker(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed((page / "report.html").read_text("utf-8"))
    assert checker.open == []


def test_markdown_links_to_the_figures_beside_it(page):
    text = (page / "report.md").read_text("utf-8")
    assert set(re.findall(r"!\[.*\]\((.*)\)", text)) == {path.name for path in page.glob("*.png")}


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_texts_are_escaped_and_other_scripts_kept(page, file):
    text = (page / file).read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "Title &lt;&amp;&gt;" in text
    assert TARGETS["cldr_date_te"] in text
    assert "Telugu (te)" in text


def test_markdown_escapes():
    assert markdown("a*b_c _d_ `e` | [x](y) <i>\nf $1$") == (
        r"a\*b_c \_d\_ \`e\` \| [x\](y) &lt;i&gt; ⏎ f \$1\$"
    )


def test_every_markdown_row_has_the_columns_of_its_header(page):
    columns = None
    for line in (page / "report.md").read_text("utf-8").splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        assert columns in (None, count)
        columns = count


def test_samples_show_each_method_and_mark_what_is_right(page):
    text = (page / "report.md").read_text("utf-8")
    sample = text[text.index("<summary>cldr_date</summary>") :]
    # Of the first two examples, lora has the first right, sira both.
    marks = re.findall(r"^\| (frozen|lora|sira) (.) \|", sample, re.MULTILINE)
    first_two = [("frozen", "✗"), ("lora", "✓"), ("sira", "✓")]
    first_two += [("frozen", "✗"), ("lora", "✗"), ("sira", "✓")]
    assert marks[:12] == 2 * first_two
    # A call that is not the target's text may still be right.
    assert marks[-6:] == [(name, "≠" if mark == "✗" else mark) for name, mark in first_two]


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


def test_a_report_of_an_empty_directory(tmp_path):
    (tmp_path / "run").mkdir()
    path = report.write_report(tmp_path / "out", {"run": tmp_path / "run"})
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "report.md", "overview.png"}
    text = path.read_text("utf-8")
    assert "run: no summary.json." in text
    assert "run: no evaluation_test.json." in text


def test_a_report_says_why_curves_and_outputs_are_missing(runs, tmp_path):
    directory = make_run(tmp_path / "run", method="lora")
    (directory / "metrics.jsonl").unlink()
    (directory / "predictions_test.jsonl").unlink()
    runs = {"frozen": runs["frozen"], "sira": runs["sira"], "run": directory}
    text = report.write_report(tmp_path / "out", runs).read_text("utf-8")
    assert "run has no curve: no metrics.jsonl." in text
    assert "frozen has no curve: nothing was trained." in text
    assert "run has none: no predictions_test.jsonl." in text
    assert "(no prediction)" in text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content", [b'{"step": 1, "task', b"\xff\xfe\x00", b"[1, 2]\n", b"{}\n", b"[" * 100_000]
)
def test_a_damaged_file_is_named(tmp_path, file, content):
    directory = make_run(tmp_path / "run", routers=True)
    (directory / file).write_bytes(content)
    if (file, content) == ("summary.json", b"{}\n"):
        assert "summary.json has no steps" in report.format_table({"run": directory})
        return
    with pytest.raises(DataError, match=re.escape(str(directory / file))):
        report.write_report(tmp_path / "out", {"run": directory})
    assert not (tmp_path / "out").exists()


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


def test_an_output_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        report.write_report(tmp_path / "out", {"run": tmp_path / "run"})


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


def test_routing_by_group_weighs_tasks_by_tokens(tmp_path):
    directory = make_run(tmp_path / "run", routers=True)
    (run,) = run_results.read_runs({"run": directory})
    groups = {"dates": ["cldr_date_sw", "cldr_date_te"], "nothing": []}
    found = figures.task_statistics(run.router, groups)

    raw = router_report()["projections"].values()
    load_E, entropy_L, distance_L = np.zeros(4), np.zeros(3), np.zeros(3)
    for statistics in raw:
        for layer in range(3):
            weights = np.array(statistics["task_tokens"][layer][:2])
            weights /= weights.sum()
            by_task = statistics["task_expert_load"][layer]
            mixed_E = weights[0] * np.array(by_task[0]) + weights[1] * np.array(by_task[1])
            load_E += 4 * mixed_E / (3 * len(raw))
            entropy_L[layer] += weights @ statistics["task_gate_entropy"][layer][:2] / len(raw)
            moved = np.maximum(mixed_E - np.array(statistics["expert_load"][layer]), 0).sum()
            distance_L[layer] += moved / len(raw)
    np.testing.assert_allclose(found["load_UE"][0], load_E)
    np.testing.assert_allclose(found["entropy_UL"][0], entropy_L)
    np.testing.assert_allclose(found["distance_UL"][0], distance_L)
    assert all(np.isnan(values[1]).all() for values in found.values())


def test_projections_stand_in_the_order_of_a_layer(tmp_path):
    directory = make_run(tmp_path / "run", routers=True)
    (run,) = run_results.read_runs({"run": directory})
    assert [p.name for p in run.router.projections] == ["attention/q", "mlp/down"]
    table = report_tables.router_table(run.router)
    load = np.array(router_report()["projections"]["mlp/down"]["expert_load"])
    assert table.rows[1][0].text == "mlp/down"
    assert table.rows[1][4].text == f"{4 * load.max():.2f}"


@pytest.mark.parametrize(
    "content",
    [
        router_report(by_task=False),
        router_report(tasks=("only",), layers=1, experts=1),
        router_report(tasks=("名前", "$a$b_sw"), experts=9),
    ],
    ids=["not by task", "one of everything", "odd names"],
)
def test_figures_of_unusual_routers(tmp_path, content):
    directory = make_run(tmp_path / "run", routers=True)
    # Projections may have different numbers of experts.
    content["projections"]["attention/v"] = router_report(
        tasks=content["tasks"], experts=2, by_task="task_tokens" in str(content)
    )["projections"]["attention/q"]
    (directory / "router_test.json").write_text(json.dumps(content))
    (run,) = run_results.read_runs({"run": directory})
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        drawn = figures.draw_all([run])
    assert ("task_routing_run.png" in drawn) == ("task_tokens" in str(content))
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "scripts" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


def test_command_line(runs, tmp_path):
    workdirs = ",".join(f"{name}={path}" for name, path in runs.items())
    done = run_script(f"--workdirs={workdirs}", f"--out={tmp_path / 'out'}", "--title=A title")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(report.format_table(runs))
    assert done.stdout.endswith(f"report: {tmp_path / 'out' / 'report.html'}\n")
    assert "<h1>A title</h1>" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdirs=NAME=DIRECTORY,... and --out=DIRECTORY are needed"),
        (["--workdirs=a", "--out=x"], "'a' is not allowed: use NAME=DIRECTORY"),
        (["--workdirs=a=b,a=c", "--out=x"], "'a=c' is not allowed"),
        (["--workdirs=a=/does/not/exist", "--out=x"], "/does/not/exist: the directory of run"),
    ],
)
def test_mistakes_on_the_command_line_take_one_line(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*\n", done.stderr)
    assert message in done.stderr


def test_the_tables_need_neither_matplotlib_nor_jax():
    code = (
        "import sys, scripts.report; print({'matplotlib', 'jax', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout == "set()\n"
