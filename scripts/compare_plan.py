"""Which runs a comparison has and how large each method is: from the command line's options to checked experiments."""

import dataclasses
import inspect
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scripts import assemble, compare_budget
from scripts.arguments import parse_value
from scripts.compare_budget import BASELINE, BUDGETS, Size
from scripts.compare_runs import RunSpec, run_directory, seed_major
from sira_jax.adapters import METHODS, AdapterConfig
from sira_jax.errors import ConfigError, check
from sira_jax.models import ModelConfig
from sira_jax.training.config import ExperimentConfig, make_experiment

# The registry's name for the frozen model.
FROZEN = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of scripts/compare.py.

    Attributes:
      config: file of the experiment, whose get_config takes the method.
      methods: names, or "all".
      seeds: whole numbers, as text.
      budget: "parameters" or "rank".
      rank: of the baseline, and under "rank" of all.
      tasks, model, num_steps: what to put in the place of the config's; empty and None leave it.
      overrides: dotted field of the experiment -> value, for all methods.
      sets: METHOD.FIELD=VALUE or METHOD.optimizer.FIELD=VALUE each.
    """

    config: str
    methods: Sequence[str] = ("all",)
    seeds: Sequence[str] = ("0", "1", "2")
    budget: str = "parameters"
    rank: int = 4
    tasks: Sequence[str] = ()
    model: str | None = None
    num_steps: int | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sets: Sequence[str] = ()


def plan_runs(options: Options, workdir: Path) -> tuple[dict[str, list[RunSpec]], dict[str, Size]]:
    """The runs of each method and its size, all of them checked.

    Raises:
      SiraError: a flag, a field or a name is not allowed, or a run directory holds another experiment.
    """
    methods, seeds = _methods(options), read_seeds(options)
    check(options.budget in BUDGETS, "--budget", options.budget, f"one of {', '.join(BUDGETS)}")
    check(options.rank >= 1, "--rank", options.rank, "a whole number of at least 1")
    configs = {
        method: _read_config(options, method) for method in dict.fromkeys((BASELINE, *methods))
    }
    _apply_sets(options, configs, methods)
    start = make_experiment(configs[BASELINE].to_dict())
    model = assemble.Plan(start).base.config
    if _is_all(options):
        methods = [method for method in methods if _fits(method, configs[method], model)]
    baseline = compare_budget.resized(start.adapter, "rank", options.rank)
    target = compare_budget.count(baseline, model)
    sizes, by_method = {}, {}
    for method in methods:
        try:
            experiment = make_experiment(configs[method].to_dict())
            adapter, sizes[method] = _fit(options, experiment.adapter, model, target)
            experiment = dataclasses.replace(experiment, adapter=adapter)
            by_method[method] = [
                RunSpec(
                    method, seed, run_directory(workdir, method, seed), _seeded(experiment, seed)
                )
                for seed in (seeds if adapter else seeds[:1])
            ]
            assemble.Plan(by_method[method][0].experiment)
        except ConfigError as error:
            raise ConfigError(f"{method}: {error}") from None
    for run in seed_major(by_method):
        run.check_resumable()
    return by_method, sizes


def _is_all(options: Options) -> bool:
    return list(options.methods) == ["all"]


def _fits(method: str, config: ConfigDict, model: ModelConfig) -> bool:
    """Whether the model can have the method; says why where it cannot."""
    adapter = make_experiment(config.to_dict()).adapter
    try:
        if adapter is not None:
            adapter.check_model(model.projections)
    except ConfigError as error:
        print(f"{method} is left out: {error}", flush=True)
        return False
    return True


def _seeded(experiment: ExperimentConfig, seed: int) -> ExperimentConfig:
    train = dataclasses.replace(experiment.train, seed=seed)
    return dataclasses.replace(experiment, train=train)


def _fit(
    options: Options, adapter: AdapterConfig | None, model: ModelConfig, target: int
) -> tuple[AdapterConfig | None, Size]:
    if adapter is None:
        return None, Size({}, 0, 0, target)
    fitted = compare_budget.fit(
        adapter,
        options.budget,
        options.rank,
        lambda config: compare_budget.count(config, model),
        target,
    )
    return fitted, compare_budget.measure(fitted, adapter, model, target)


def _methods(options: Options) -> list[str]:
    known = (FROZEN, *METHODS)
    if _is_all(options):
        return list(known)
    for name in options.methods:
        check(name in known, "--methods", name, f"all, or some of {', '.join(known)}")
    check(
        len(options.methods) == len(set(options.methods)) > 0,
        "--methods",
        ",".join(options.methods),
        "at least one, each once",
    )
    return list(options.methods)


def read_seeds(options: Options) -> list[int]:
    """The seeds as numbers; ConfigError where they are not."""
    for seed in options.seeds:
        check(seed.isdecimal() and int(seed) < 2**32, "--seeds", seed, "whole numbers under 2**32")
    seeds = [int(seed) for seed in options.seeds]
    check(len(seeds) == len(set(seeds)) > 0, "--seeds", options.seeds, "at least one, each once")
    return seeds


def _read_config(options: Options, method: str) -> ConfigDict:
    """The config file's experiment for a method, with what the flags change in all of them."""
    path = options.config
    get_config = runpy.run_path(path)["get_config"]
    if not inspect.signature(get_config).parameters:
        raise ConfigError(f"--config={path}: its get_config must take the method")
    config = get_config(method)
    for name, value in options.overrides.items():
        if name.split(".")[0] == "adapter":
            raise ConfigError(f"--config.{name}: use --set=METHOD.FIELD=VALUE, a method at a time")
        check(name != "train.seed", f"--config.{name}", value, "use --seeds")
    config.update_from_flattened_dict(dict(options.overrides))
    if options.tasks:
        config.data.tasks = tuple(options.tasks)
    if options.model:
        config.model.path = options.model
    if options.num_steps is not None:
        config.train.num_steps = options.num_steps
    return config


def _apply_sets(
    options: Options, configs: Mapping[str, ConfigDict], methods: Sequence[str]
) -> None:
    """Changes what --set says."""
    for item in options.sets:
        match = re.fullmatch(r"(\w+)\.(?:(adapter|optimizer)\.)?(\w+)=(.*)", item, re.DOTALL)
        if match is None:
            raise ConfigError(
                f"--set={item}: write METHOD.FIELD=VALUE or METHOD.optimizer.FIELD=VALUE"
            )
        method, section, field, text = match.groups()
        check(method in methods, "--set", item, f"a method of --methods: {', '.join(methods)}")
        config = configs[method][section or "adapter"]
        if field not in config or field == "method":
            known = ", ".join(name for name in config if name != "method")
            raise ConfigError(f"--set={item}: no such field; it has {known}")
        if section != "optimizer" and field == METHODS[method].size_field:
            sized = options.budget == "parameters" or field == "rank"
            check(not sized, "--set", item, f"the budget sets {field}")
        with config.ignore_type():
            config[field] = parse_value(text)


def settings_of(options: Options, sizes: Mapping[str, Size]) -> dict[str, Any]:
    """What the report needs besides the runs, as plain data."""
    return {
        "budget": options.budget,
        "rank": options.rank,
        "seeds": read_seeds(options),
        "sizes": {
            method: {
                "fields": dict(size.fields),
                "trained": size.trained,
                "active": size.active,
                "deviation": size.deviation,
            }
            for method, size in sizes.items()
        },
    }
