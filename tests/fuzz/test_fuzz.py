"""Damaged files of every format: each is refused with one line, or loads as something sound (docs/reliability.md)."""

import collections
import os
from pathlib import Path

import pytest

from tests.fuzz import cases
from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS, real_targets

EXTRA_BYTES = 1 << 30
ALL = list(TARGETS | real_targets())


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name, tmp_path, monkeypatch):
    """The same cases every time; `python -m tests.fuzz.worker NAME SEED 1` repeats one, a failing one among them."""
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    target = TARGETS[name]
    sound = cases.seed_folders(target, tmp_path / "sound")
    for folder in sound:
        target.load(folder)
    with cases.limited_memory(EXTRA_BYTES):
        outcomes = [
            cases.run_case(target, sound, seed, tmp_path / "case")
            for seed in range(target.in_suite)
        ]
    findings = [
        f"seed {seed}: {outcome.detail} ({outcome.change})"
        for seed, outcome in enumerate(outcomes)
        if outcome.kind == "finding"
    ]
    assert not findings, "\n".join(findings)
    kinds = collections.Counter(outcome.kind for outcome in outcomes)
    assert kinds["refused"] > 0, kinds


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ALL)
def test_for_a_long_time(name):
    seconds = float(os.environ.get("FUZZ_SECONDS") or 300) / len(ALL)
    summary = fuzz(name, int(os.environ.get("FUZZ_SEED") or 0), seconds)
    print("\n" + "\n".join([summary.row(name), *summary.findings]))
    assert summary.refused > 0
    assert not summary.findings, "\n".join(summary.findings)


# The judge itself: what it is to find, it finds.


def _judged(load, tmp_path, names_file=True):
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "a.json").write_text("{}")
    target = cases.Target(lambda folder: None, load, names_file)
    return cases.run_case(target, [tmp_path / "sound"], 0, tmp_path / "case")


def _hang(folder: Path) -> None:
    while True:
        pass


def _raise(error):
    def load(folder):
        raise error

    return load


@pytest.mark.parametrize(
    ("load", "kind", "detail"),
    [
        (_raise(KeyError("x")), "finding", "KeyError"),
        (_raise(cases.SiraError("no file of it")), "finding", "names no file"),
        (lambda folder: None, "loaded", ""),
        (lambda folder: _raise(cases.SiraError(f"{folder}: bad"))(folder), "refused", "bad"),
        (lambda folder: len(b"x" * (200 << 20)), "finding", "MiB were held"),
        (_hang, "finding", "took more than"),
    ],
)
def test_the_judge(load, kind, detail, tmp_path, monkeypatch):
    if load is _hang:
        monkeypatch.setattr(cases, "SECONDS", 0.2)
    outcome = _judged(load, tmp_path)
    assert outcome.kind == kind, outcome
    assert detail in outcome.detail


@pytest.mark.fuzz
def test_a_worker_that_dies_is_a_finding():
    summary = fuzz("no such format", 0, 1.0)
    (finding,) = summary.findings
    assert "status 1" in finding
    assert "no such format" in finding
