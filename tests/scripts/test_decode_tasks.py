"""What the metrics of a task are given of the decoded texts."""

import types

import numpy as np

from scripts import assemble
from tasks.loading import TokenizedTask


def test_metrics_get_the_texts_as_they_were_decoded():
    """White space at the ends is a metric's own matter: sequence accuracy counts it, exact match does not."""
    ids = [np.zeros(1, np.int32)] * 2
    examples = [{"inputs": "a", "targets": "x "}, {"inputs": "b", "targets": "y"}]
    loaded = [
        TokenizedTask(name, "test", ids, ids, examples, (name,))
        for name in ("sequence_accuracy", "exact_match")
    ]
    plan = types.SimpleNamespace(_fit=lambda prompt, _: prompt, decode=lambda *_: ["x ", " y"] * 2)
    scores, records = assemble.Plan.decode_tasks(plan, None, None, loaded, "")
    assert scores["sequence_accuracy"] == {"sequence_accuracy": 50.0}
    assert scores["exact_match"] == {"exact_match": 100.0}
    assert [record["prediction"] for record in records] == ["x ", " y"] * 2
