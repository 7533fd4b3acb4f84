"""Trains every method on equal terms, with several seeds, and writes one table and a picture.

  python scripts/compare.py --workdir=runs/compare --methods=all --task=cldr_all --budget=parameters --rank=32
  python scripts/compare.py --workdir=runs/rank4 --methods=lora,sira --budget=rank --rank=4 --seeds=0,1,2,3,4
  python scripts/compare.py --workdir=runs/compare --report_only
  python scripts/compare.py --results=docs/comparison_cldr.json

The runs differ in the adapter alone: data, order, steps, optimizer and seeds are the same. With --budget=parameters each method
has as many trained parameters as LoRA has at --rank, as nearly as its size field allows; with --budget=rank the same rank.
--config.SECTION.FIELD=VALUE changes all runs, --set=METHOD.FIELD=VALUE one method's adapter.

Run the same command again to go on after a stop. The directory gets METHOD/seedN (run directories), comparison.json,
comparison.md and comparison.png; docs/comparison.md says what the columns mean.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from scripts.cli import run_main
from scripts.compare_budget import BASELINE, BUDGETS, Size
from scripts.compare_plan import Options, plan_runs, settings_of
from scripts.compare_report import render, write_comparison
from scripts.compare_runs import (
    COSTS_FILE,
    LOG_FILE,
    Runner,
    RunSpec,
    first_experiments,
    read_json,
    save_plan,
    seed_major,
)
from scripts.compare_table import Row
from sira_jax.errors import ConfigError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment; it takes the method as its argument."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The comparison's directory.")
METHOD_NAMES = flags.DEFINE_list(
    "methods", ["all"], "Methods, none for the frozen model, or all for it and every method."
)
BUDGET = flags.DEFINE_enum("budget", "parameters", BUDGETS, "What is equal.")
RANK = flags.DEFINE_integer("rank", 4, "Rank of LoRA, which is the budget; of all, if equal.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each method.")
TASK = flags.DEFINE_list("task", [], "Tasks or mixtures; default: the config's.")
MODEL = flags.DEFINE_string("model", None, "The base model; default: the config's.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Training steps; default: the config's.")
SET = flags.DEFINE_multi_string(
    "set", [], "METHOD.FIELD=VALUE of its adapter, or METHOD.optimizer.FIELD=VALUE; repeatable."
)
SPEED_ROUNDS = flags.DEFINE_integer(
    "speed_rounds", 11, "Steps of each method that are timed; 0 measures no costs.", lower_bound=0
)
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Only write what the directory's runs say.")
RESULTS = flags.DEFINE_string(
    "results", None, "Only write table and picture of this comparison.json, beside it."
)
PLAN_ONLY = flags.DEFINE_bool("plan_only", False, "Only check everything and print the sizes.")

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "experiments" / "compare.py"

FAILED = 1


def main(argv: list[str]) -> int:
    """Checks everything, runs what is not done yet, and reports; 1 where a result is missing."""
    del argv
    if RESULTS.value:
        render(Path(RESULTS.value))
        return 0
    if not WORKDIR.value:
        raise ConfigError("--workdir=DIR is needed")
    workdir, measured = Path(WORKDIR.value), True
    if not REPORT_ONLY.value:
        options = _options()
        by_method, sizes = plan_runs(options, workdir)
        print(_describe(sizes), flush=True)
        if PLAN_ONLY.value:
            return 0
        save_plan(workdir, settings_of(options, sizes), by_method)
        with Runner(seed_major(by_method), workdir / "compilation_cache") as runner:
            measured = _run_all(runner, workdir, by_method)
    rows = write_comparison(workdir)
    return 0 if measured and all(map(_is_whole, rows)) else FAILED


def _options() -> Options:
    flag = flags.FLAGS["config"]
    return Options(
        config=config_flags.get_config_filename(flag),
        methods=METHOD_NAMES.value,
        seeds=SEEDS.value,
        budget=BUDGET.value,
        rank=RANK.value,
        tasks=TASK.value,
        model=MODEL.value,
        num_steps=NUM_STEPS.value,
        overrides=config_flags.get_override_values(flag),
        sets=SET.value,
    )


def _describe(sizes: Mapping[str, Size]) -> str:
    """What the budget made of each method, a line a method."""
    target = next(iter(sizes.values())).target
    lines = [f"budget {BUDGET.value}: {BASELINE} of rank {RANK.value} trains {target:,} parameters"]
    for method, size in sizes.items():
        fields = ", ".join(f"{name}={value}" for name, value in size.fields.items())
        lines.append(
            f"  {method:12} {size.trained:>13,} trained ({100 * size.deviation:+7.1f} %),"
            f" {size.active:>13,} active   {fields or 'as configured'}"
        )
    return "\n".join(lines)


def _run_all(runner: Runner, workdir: Path, by_method: Mapping[str, list[RunSpec]]) -> bool:
    """The first seed of all methods, their costs, then the other seeds; whether the costs were measured."""
    first = [runs[0] for runs in by_method.values()]
    for run in first:
        runner.run(run)
    adapted = [run for run in first if run.experiment.adapter and run.is_done()]
    measured = not SPEED_ROUNDS.value or not adapted or _measure_costs(runner, workdir, adapted)
    for run in seed_major(dict(by_method))[len(first) :]:
        runner.run(run)
    return measured


def _measure_costs(runner: Runner, workdir: Path, specs: Sequence[RunSpec]) -> bool:
    """Measures what a step costs, unless that was done before for these very methods.

    A method without a finished run is left out: it might not compile, and would take the others with it.
    """
    wanted = first_experiments(specs)
    if (read_json(workdir / COSTS_FILE) or {}).get("experiments") == wanted:
        return True
    print(f"costs of a step: {len(specs)} methods, log in {workdir / LOG_FILE}", flush=True)
    methods = [spec.method for spec in specs]
    rounds = f"--rounds={SPEED_ROUNDS.value}"
    log = workdir / LOG_FILE
    reason = runner.call("compare_costs.py", str(workdir), *methods, rounds, log=log)
    if reason:
        print(f"costs of a step: FAILED ({reason})", flush=True)
    return reason is None


def _is_whole(row: Row) -> bool:
    return not row.missing and not any(isinstance(value, str) for value in row.quality.values())


if __name__ == "__main__":
    given = any(re.match(r"--?config(=|$)", argument) for argument in sys.argv[1:])
    default = [] if given else [f"--config={DEFAULT_CONFIG}"]
    run_main(main, argv=[sys.argv[0], *default, *sys.argv[1:]])
