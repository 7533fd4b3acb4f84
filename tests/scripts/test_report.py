"""The report, from run directories made by hand."""

import base64
import html.parser
import re
import subprocess
import sys
import warnings as python_warnings
from pathlib import Path

import pytest

from scripts import report
from scripts.report_page import markdown
from sira_jax.errors import DataError
from tests.scripts.synthetic_runs import FILES, TARGETS, make_run, make_three_runs

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_three_runs(tmp_path_factory.mktemp("runs"))


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


def test_an_output_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        report.write_report(tmp_path / "out", {"run": tmp_path / "run"})


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
