"""Run directories by hand for the tests of tables: an experiment and its results, without a model."""

import json
from pathlib import Path

from sira_jax.training.config import ExperimentConfig, make_experiment
from tests.scripts.comparisons import experiment

TRAINED = {"lora": 1000, "sira": 3000, "adamix": 2000}


def make_trial(
    directory: Path,
    method: str,
    seed: int,
    scores: dict[str, float],
    *,
    loss: float = 1.0,
    tasks: tuple[str, ...] | None = None,
    adapter: dict | None = None,
    **sections,
) -> ExperimentConfig:
    """A finished run with an exact match for each task (`tasks` may name the mixture of them)."""
    fields = experiment(method, seed).to_dict()
    fields["adapter"] |= adapter or {}
    fields["data"]["tasks"] = list(tasks or scores)
    for section, changes in sections.items():
        fields[section] |= changes
    made = make_experiment(fields)
    (directory / "checkpoints" / "4").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"config": made.to_dict()}))
    results = {
        "experiment": made.to_dict(),
        "checkpoint": "none" if method == "none" else 4,
        "examples": dict.fromkeys(scores, 4),
        "losses": {"test/loss": loss} | {f"test/loss/{t}": loss + i for i, t in enumerate(scores)},
        "scores": {task: {"exact_match": value} for task, value in scores.items()},
        "mean": {"exact_match": sum(scores.values()) / len(scores)},
    }
    (directory / f"evaluation_{made.evaluate.split}.json").write_text(json.dumps(results))
    if method != "none":
        trained = TRAINED[method] * made.adapter.rank // 4
        summary = {"method": method, "trained_parameters": trained, "base_parameters": 100_000}
        (directory / "summary.json").write_text(json.dumps(summary))
        lines = [{"step": s, "train/loss": loss + 1 / s, "validation/loss": loss} for s in (2, 4)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return made
