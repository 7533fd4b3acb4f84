"""The numbers behind the figures, and figures of unusual routers."""

import json
import warnings

import numpy as np
import pytest

from scripts import figures, run_results
from tests.scripts.synthetic_runs import make_run, router_report


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.draw_all([run])
    assert ("task_routing_run.png" in drawn) == ("task_tokens" in str(content))
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
