"""Run directories made by hand, for the tests of the report."""

import json
import math
from pathlib import Path

import numpy as np

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


def make_three_runs(root: Path) -> dict[str, Path]:
    """The frozen model, LoRA, and a SiRA that answers better but has a higher loss and cost."""
    return {
        "frozen": make_run(root / "frozen", method="frozen", exact=0.0, loss=3.0, right=0),
        "lora": make_run(root / "lora", method="lora", exact=50.0, loss=1.0, right=1),
        "sira": make_run(root / "sira", exact=62.5, loss=1.25, right=3, routers=True),
    }
