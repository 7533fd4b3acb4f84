"""Writes what the runs of a comparison say: comparison.json, comparison.md and comparison.png."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.compare_budget import BASELINE
from scripts.compare_runs import (
    COSTS_FILE,
    SUMMARY_FILE,
    RunSpec,
    first_experiments,
    load_plan,
    read_json,
    seed_major,
)
from scripts.compare_table import CONFIDENCE, Row, make_rows, row_from_json, to_table
from scripts.report_page import Figure, Paragraph, Section, markdown_table, to_markdown
from sira_jax.errors import DataError
from sira_jax.files import write_atomically, write_text
from sira_jax.training.config import ExperimentConfig


def write_comparison(workdir: Path) -> list[Row]:
    """Writes comparison.json, comparison.md and comparison.png from the run directories, and prints the table.

    Raises:
      DataError: the directory holds no comparison.
    """
    settings, by_method = load_plan(workdir)
    measured = read_json(workdir / COSTS_FILE)
    current = first_experiments([runs[0] for runs in by_method.values()])
    costs: Mapping[str, Any] | str = f"there is no {COSTS_FILE}"
    if measured is not None:
        old = measured["experiments"]
        costs = {m: c for m, c in measured["methods"].items() if current.get(m) == old[m]}
    rows = make_rows(by_method, settings["sizes"], costs)
    experiment = next(iter(by_method.values()))[0].experiment
    result = {
        "terms": _terms(settings, experiment),
        "split": experiment.evaluate.split,
        "settings": settings,
        "confidence": CONFIDENCE,
        "versions": _versions(),
        "costs": measured,
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": [_raw(run) for run in seed_major(by_method)],
    }
    path = workdir / "comparison.json"
    write_text(path, json.dumps(result, indent=1))
    render(path)
    return rows


def render(path: Path) -> None:
    """Writes the table and the picture of a comparison's JSON file beside it, with its name, and prints the table.

    Raises:
      DataError: the file is none of a comparison.
    """
    # Only the picture needs matplotlib.
    from scripts import compare_figure

    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [row_from_json(row) for row in result["rows"]]
        text, split = result["terms"], result["split"]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no comparison.json of scripts/compare.py ({error})") from None
    picture = path.with_suffix(".png")
    table = to_table(rows, split)
    caption = "Means over the seeds with their 95% intervals; the dashed line is the frozen model."
    sections = [
        Section("Results", [Paragraph(text), table]),
        Section("Picture", [Figure(picture.name, caption)]),
    ]
    png = compare_figure.draw(rows, split)
    write_atomically(picture, lambda file: file.write(png))
    write_text(path.with_suffix(".md"), to_markdown("Methods on equal terms", sections))
    print(f"\n{text}\n\n{markdown_table(table)}\n\nfiles: {path.with_suffix('')}.{{json,md,png}}")


def _terms(settings: Mapping[str, Any], experiment: ExperimentConfig) -> str:
    same = "trained parameters" if settings["budget"] == "parameters" else "rank"
    train, data = experiment.train, experiment.data
    return (
        f"Equal {same}: {BASELINE} of rank {settings['rank']} is the measure. Each run:"
        f" {experiment.model.path} on {', '.join(data.tasks)}, {train.num_steps} steps of"
        f" {data.batch_size} x {data.sequence_length} tokens; seeds"
        f" {', '.join(map(str, settings['seeds']))}. ± is half the 95% interval of the mean over the"
        " seeds (Student's t)."
    )


def _raw(run: RunSpec) -> dict[str, Any]:
    return {
        "method": run.method,
        "seed": run.seed,
        "directory": str(run.directory),
        "failure": run.failure(),
        "experiment": run.experiment.to_dict(),
        "summary": read_json(run.directory / SUMMARY_FILE),
        "evaluation": read_json(run.evaluation_file),
    }


def _versions() -> dict[str, str]:
    names = ("sira-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }
