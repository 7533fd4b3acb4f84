"""Evaluates a run, several adapters together, or the frozen model, by decoding held-out examples.

  python scripts/evaluate.py --workdir=runs/sira
  python scripts/evaluate.py --config=configs/experiments/starter.py:sira --checkpoint=none --workdir=runs/frozen
  python scripts/evaluate.py --adapters=sw=runs/sw,fi=runs/fi --assign="*_sw=sw,*_fi=fi,*=base" --workdir=runs/both

Prints each task's metrics and their mean. The run directory gets evaluation_SPLIT.json, predictions_SPLIT.jsonl and, for
methods with routers, router_SPLIT.json: expert load and gate entropy per layer and per task.

--adapters loads adapters from run directories or adapter folders, and --assign says which task uses which (base is the frozen
model; the first pattern that fits counts); examples of all tasks are decoded together. The tasks are those of --config, or of
the first adapter's run.

--multihost: see scripts/train.py.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from scripts import adapters, assemble
from scripts.cli import run_main
from sira_jax.errors import ConfigError
from sira_jax.files import write_text
from sira_jax.models import make_model
from sira_jax.training import loop, multihost
from sira_jax.training.train_state import merge_params, split_params
from tasks import TokenizedTask

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment; default: the run directory's own."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "best, latest, a step, or none for the frozen model."
)
MULTIHOST = flags.DEFINE_bool("multihost", False, "Run as one of several processes.")
ADAPTERS = flags.DEFINE_string("adapters", None, "Several adapters, NAME=DIR,NAME=DIR.")
ASSIGN = flags.DEFINE_string(
    "assign", "", "Which task uses which of --adapters: TASK=NAME,PATTERN=NAME; * and ? are wild."
)


def main(argv: list[str]) -> None:
    """Evaluates and writes the results."""
    del argv
    if ADAPTERS.value is not None:
        if MULTIHOST.value:
            raise ConfigError("--multihost and --adapters exclude one another")
        results = evaluate_several(ADAPTERS.value, ASSIGN.value, WORKDIR.value, CHECKPOINT.value)
    elif ASSIGN.value:
        raise ConfigError("--assign needs --adapters=NAME=DIR,NAME=DIR")
    else:
        experiment = assemble.read_experiment(CONFIG.value, WORKDIR.value)
        with multihost.joined() if MULTIHOST.value else contextlib.nullcontext():
            plan = assemble.Plan(experiment)
            results = evaluate(plan, WORKDIR.value, CHECKPOINT.value)
            is_main = multihost.is_main()
        if not is_main:
            return
    print(format_scores(results))


def evaluate(plan: assemble.Plan, workdir: str | None, checkpoint: str) -> dict:
    """Loss, decoded metrics and the router report; see the module's text for the files it writes."""
    evaluation = plan.experiment.evaluate
    loaded, _ = plan.load_tasks(evaluation.split, evaluation.examples_per_task)
    base = plan.load_base()
    frozen = split_params(base.params)[1]
    adapter, step = {}, None
    model = make_model(plan.base.config)
    if checkpoint != "none" and plan.experiment.adapter is not None:
        model = plan.model(len(loaded))
        adapter, step = assemble.restore_adapter(
            plan.experiment, plan.mesh, model, frozen, workdir or "", checkpoint, plan.rules
        )
    losses, report = plan.loss_evaluator(model, frozen, loaded, evaluation.split).run(adapter)
    scores, records = plan.decode_tasks(model, merge_params(adapter, frozen), loaded, "decode")
    results = {
        "experiment": plan.experiment.to_dict(),
        "checkpoint": step if step is not None else "none",
        **_results(evaluation.split, loaded, losses, scores),
    }
    _write(workdir, evaluation.split, results, records, report)
    return results


def evaluate_several(pairs: str, assignment: str, workdir: str | None, checkpoint: str) -> dict:
    """The same with several adapters, each task with the one it is assigned."""
    directories = adapters.parse_adapters(pairs)
    if checkpoint == "none":
        raise ConfigError("--checkpoint=none and --adapters exclude one another: assign base")
    if workdir and (Path(workdir) / loop.CONFIG_FILE).exists():
        raise ConfigError(f"--workdir={workdir}: is one run's; several adapters need their own")
    plan = assemble.Plan(adapters.read_experiment(CONFIG.value, directories))
    evaluation = plan.experiment.evaluate
    loaded, _ = plan.load_tasks(evaluation.split, evaluation.examples_per_task)
    assigned = adapters.assign(assignment, [task.name for task in loaded], directories)
    frozen = split_params(plan.load_base().params)[1]
    several = adapters.load_all(plan, frozen, directories, checkpoint)
    losses, report = several.losses(loaded, assigned, evaluation.split)
    scores, records = several.decode_tasks(loaded, assigned, "decode")
    results = {
        "experiment": plan.experiment.to_dict(),
        "checkpoint": checkpoint,
        "adapters": several.sources,
        "assigned": assigned,
        **_results(evaluation.split, loaded, losses, scores),
    }
    _write(workdir, evaluation.split, results, records, report)
    return results


def _results(split: str, loaded: Sequence[TokenizedTask], losses: dict, scores: dict) -> dict:
    return {
        "split": split,
        "examples": {task.name: len(task) for task in loaded},
        "losses": losses,
        "scores": scores,
        "mean": assemble.mean_scores(scores),
        "peak_memory_bytes": assemble.peak_memory_bytes(),
    }


def _write(
    workdir: str | None, split: str, results: dict, records: Sequence[dict], report: dict
) -> None:
    if not (workdir and multihost.is_main()):
        return
    directory = Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(directory / f"predictions_{split}.jsonl", "".join(lines))
    if report:
        write_text(directory / f"router_{split}.json", json.dumps(report))
    # The last one: it says that the others are there.
    write_text(directory / f"evaluation_{split}.json", json.dumps(results, indent=1))


def format_scores(results: dict) -> str:
    """A table: a row a task, a column a metric; percentages but for chrF, which counts to 100 itself."""
    scores = results["scores"]
    metrics = sorted({name for task in scores.values() for name in task})
    rows = [*scores.items(), ("mean", results["mean"])]
    width = max(len(name) for name, _ in rows)
    lines = [" ".join([f"{'task':{width}}", f"{'examples':>9}", *(f"{m:>12}" for m in metrics)])]
    for name, values in rows:
        examples = results["examples"].get(name, sum(results["examples"].values()))
        cells = [f"{values[m]:12.3f}" if m in values else f"{'':12}" for m in metrics]
        lines.append(" ".join([f"{name:{width}}", f"{examples:9d}", *cells]))
    split = results["split"]
    lines.append(f"loss {results['losses'][f'{split}/loss']:.4f} nats a target token")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
