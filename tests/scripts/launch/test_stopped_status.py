"""train.py's exit status tells a cluster a stop from the end."""

import types

import pytest
from absl import flags

from tests.scripts.flagged import imported


@pytest.mark.parametrize(
    ("outcome", "arguments", "status"),
    [
        ("done", ["--stopped_status=75"], 0),
        ("SIGTERM", ["--stopped_status=75"], 75),
        ("SIGTERM", [], 0),
    ],
)
def test_exit_status(monkeypatch, capsys, tmp_path, outcome, arguments, status):
    experiment = types.SimpleNamespace(adapter="an adapter")
    with imported("train") as train:
        monkeypatch.setattr(train.assemble, "read_experiment", lambda *_: experiment)
        monkeypatch.setattr(train.assemble, "Plan", lambda _: "a plan")
        monkeypatch.setattr(train, "train", lambda *_, **__: outcome)
        monkeypatch.setattr(train.signal, "signal", lambda *_: None)
        flags.FLAGS(["train.py", f"--workdir={tmp_path}", *arguments])
        assert train.main([]) == status
    assert ("saving" in capsys.readouterr().out) == (outcome != "done")
