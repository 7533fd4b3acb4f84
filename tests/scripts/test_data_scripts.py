"""scripts/show_task.py and scripts/download_data.py from the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks import datasets

ROOT = Path(__file__).parents[2]


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_show_a_task():
    result = run("show_task.py", "cldr_unit_en", "--num=1", "--full")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert "  inputs   'Write the measure 2.5 day in full in English.'" in lines
    assert "  targets  '2.5 days'" in lines
    assert "     9 ids 53 49 56 35 103 100 124 118 1" in lines
    cells = re.compile(r"\s+\d+ '.*'\s+\d+ '.*'\s+(\d+)\s+(\d+)\s+([01])\s+(\d+)")
    table = [match.groups() for line in lines if (match := cells.fullmatch(line))]
    # 45 prompt and 9 target tokens: 53 positions, the last 9 of which count.
    assert table == [("1", str(i), "1" if i >= 44 else "0", "0") for i in range(53)]


def test_show_a_mixture_through_a_template():
    result = run("show_task.py", "cldr_sw", "--num=2", "--template=plain", "--rows=2")
    assert result.returncode == 0, result.stderr
    assert "in full in Swahili.\\n'" in result.stdout
    assert "  task 0 is cldr_date_sw\n  task 1 is cldr_unit_sw\n" in result.stdout
    assert "16.67%  cldr_date_sw" in result.stdout
    assert "(--full shows every position)" in result.stdout


def test_list():
    result = run("show_task.py", "--list")
    assert result.returncode == 0, result.stderr
    assert "cldr_date_sw" in result.stdout
    assert "2000/100/200" in result.stdout
    assert re.search(r"snips +\?/\?/700 ", result.stdout)
    assert re.search(r"afriqa_sw +-/-/\? ", result.stdout)
    assert re.search(r"xtreme_up_ner +20, \? ", result.stdout)
    assert "mixtures" in result.stdout


def test_output_that_is_cut_off_is_no_error():
    command = f"{sys.executable} {ROOT}/scripts/show_task.py --list | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "tasks (train/validation/test" in result.stdout
    assert result.stderr == ""


def test_through_seqio():
    result = run("show_task.py", "cldr_date_sw", "--num=1", "--seqio")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "targets_pretokenized Ijumaa, 22 Mei 1970" in result.stdout


MISTAKES = [
    (["cldr_dat_sw"], "no task or mixture 'cldr_dat_sw': close names: cldr_date_sw"),
    ([], "name a task or a mixture, or give --list"),
    (["cldr_sw", "--split=dev"], "split='dev' of task cldr_date_sw: it has"),
    (["cldr_sw", "--vocabulary=x"], "vocabulary='x' is not allowed: use bytes"),
    (["cldr_sw", "--num=0"], "argument --num: '0' is not a whole number"),
    (["cldr_sw", "--num=many"], "argument --num: 'many' is not a whole number"),
    (["cldr_sw", "--length=3"], "fits length=3"),
    (["cldr_sw", "--nmu=3"], "unrecognized arguments: --nmu=3"),
    (["bfcl_simple"], "run `python scripts/download_data.py bfcl`"),
]


# Each is a process of its own: the fast suite has the first four.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(*mistake, marks=[pytest.mark.slow] if place > 3 else [])
        for place, mistake in enumerate(MISTAKES)
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    result = run("show_task.py", *arguments, SIRA_DATA_DIR=str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == "" or "length" in message
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bfc"], "no data 'bfc': use one of bfcl, smollm2-135m"),
        ([], "the following arguments are required: NAME"),
        (["bfcl", "--mirror=/nowhere"], "mirror /nowhere has no file bfcl_eval-"),
        (["bfcl", "--mirror=http://localhost"], "of bfcl is not allowed: use a folder"),
        (
            ["snips", "--mirror=ftp://x"],
            "--mirror=ftp://x of snips is not allowed: use a folder or",
        ),
        (
            ["gsm8k", "--accept_license=MIT", "--mirror=file:///no%20where"],
            "mirror has no file /no where/gsm8k/LICENSE",
        ),
        (
            ["snips"],
            "licence CC0-1.0 (https://github.com/sonos/nlu-benchmark): read it, and accept",
        ),
        (["forumsum"], "no address is known for forumsum"),
        (
            ["gsm8k", "--accept_license=MIT", "--mirror=/nowhere"],
            "mirror has no file /nowhere/gsm8k/LICENSE",
        ),
    ],
)
def test_download_mistakes(arguments, message, tmp_path):
    environment = {"SIRA_CACHE": str(tmp_path / "cache"), "SIRA_DATA_DIR": ""}
    result = run("download_data.py", *arguments, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not [path for path in tmp_path.glob("cache/**/*") if path.is_file()]


def test_show_a_downloaded_task(tmp_path):
    datasets.write_all(tmp_path)
    result = run("show_task.py", "xtreme_up_ner_sw", "--num=1", f"--data_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "LOC: Kenya $$ PER: Ọla" in result.stdout
    with (tmp_path / "gsm8k/test.jsonl").open("a") as file:
        file.write('{"question": "?", "answer": "#### 1"}\n' * 200 + '{"question": "?", "ans')
    result = run("show_task.py", "gsm8k", "--split=test", "--num=1", f"--data_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(f"warning: {tmp_path}/gsm8k/test.jsonl: 1 of 204 lines damaged")
    assert result.stderr.count("\n") == 1
    result = run("show_task.py", "finqa", f"--data_dir={tmp_path}/none")
    assert result.returncode == 2
    assert "is not allowed: a folder that exists" in result.stderr
