"""Which runs a sweep has: from a file's get_sweep to checked experiments, each once, with a name and a directory."""

import dataclasses
import inspect
import json
import os
import re
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from scripts import assemble
from scripts.compare_runs import RunSpec, read_json
from sira_jax.errors import ConfigError, DataError, SiraError
from sira_jax.files import make_directory, write_text
from sira_jax.training.config import ExperimentConfig, make_experiment
from sira_jax.training.loop import CHECKPOINTS

REPOSITORY = Path(__file__).resolve().parents[1]
PLAN_FILE = "sweep.json"
# Keys of a run that are no field of the experiment.
CONFIG_KEY, NAME_KEY = "config", "name"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_LONGEST_PART = 200  # characters; file systems take 255 bytes, and files beside have longer names
# What the sweep's directory has itself, and the directory in which no run is looked for.
_TAKEN = (PLAN_FILE, "results.csv", "results.lock", "chosen.json", "compilation_cache", CHECKPOINTS)


@dataclasses.dataclass(frozen=True)
class SweepRun(RunSpec):
    """A run of a sweep.

    Attributes:
      label: its name, which is its directory in the sweep's.
      config: FILE or FILE:ARGUMENT that the experiment starts from.
      overrides: dotted field -> value.
    """

    label: str
    config: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The label."""
        return self.label


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep in their order, and the names that were left out -> the run that is the same.

    A run that was given again with its name is left out under it.
    """

    source: str
    runs: tuple[SweepRun, ...]
    same: Mapping[str, str]


def read_sweep(
    source: str,
    workdir: Path,
    common: Mapping[str, Any] | None = None,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> Sweep:
    """The sweep of FILE or FILE:ARGUMENT, whose experiments are valid; models and tasks are not looked at.

    Args:
      source: the file, and what its get_sweep takes.
      workdir: the sweep's directory.
      common: dotted field -> value for all runs, whatever they say themselves.
      chosen: method -> dotted field -> value for its runs, where they do not say themselves.

    Raises:
      ConfigError: the file is missing or wrong, or a run has a field, value or name that is not allowed.
    """
    path, colon, argument = source.partition(":")
    module = _load(path, "--sweep")
    get_sweep = module.get("get_sweep")
    if not callable(get_sweep):
        raise ConfigError(f"--sweep={source}: needs a function get_sweep that returns the runs")
    entries = _call(get_sweep, [argument] if colon else [], f"--sweep={source}", path)
    if not isinstance(entries, list):
        raise ConfigError(f"--sweep={source}: get_sweep must return a list of dictionaries")
    runs: list[SweepRun] = []
    same: dict[str, str] = {}
    known: dict[str, str] = {}
    keys: dict[str, str] = {}
    for number, entry in enumerate(entries):
        what = f"--sweep={source}, run {number}"
        run = _make_run(entry, module.get("CONFIG"), workdir, what, common or {}, chosen or {})
        key = _identity(run.experiment)
        if keys.setdefault(run.label, key) != key:
            raise ConfigError(f"--sweep={source}: the name {run.label!r} is given to two runs")
        if known.get(key) == run.label:
            same[run.label] = run.label  # As when a random search draws a run again.
        elif key in known:
            same[run.label] = known[key]
        else:
            known[key] = run.label
            runs.append(run)
    if not runs:
        raise ConfigError(f"--sweep={source}: get_sweep returned no run")
    _check_nesting(runs)
    return Sweep(source, tuple(runs), same)


def check_runs(runs: Sequence[SweepRun]) -> None:
    """Finds before the first run whether models and tasks are there, and whether a directory holds another experiment.

    Raises:
      SiraError: what does not fit, with the run's name.
    """
    checked = set()
    for run in runs:
        try:
            run.check_resumable()
            train = dataclasses.replace(run.experiment.train, seed=0)
            key = _identity(dataclasses.replace(run.experiment, train=train))
            if key not in checked and not run.is_done():
                assemble.Plan(run.experiment)
            checked.add(key)
        except SiraError as error:
            raise type(error)(f"{run.label}: {error}") from None


def save_sweep(workdir: Path, sweep: Sweep) -> None:
    """Writes sweep.json, from which `load_sweep` makes the runs again."""
    runs = [
        {
            "name": run.label,
            "config": run.config,
            "overrides": run.overrides,
            "experiment": run.experiment.to_dict(),
        }
        for run in sweep.runs
    ]
    make_directory(workdir, f"--workdir={workdir}")
    plan = {"sweep": sweep.source, "runs": runs, "same": dict(sweep.same)}
    write_text(workdir / PLAN_FILE, json.dumps(plan, indent=1))


def load_sweep(workdir: Path) -> Sweep:
    """The sweep that `save_sweep` wrote.

    Raises:
      DataError: there is no such file, or it is damaged or of another version.
    """
    path = workdir / PLAN_FILE
    if not path.exists():
        raise DataError(f"{path}: there is no sweep in this directory; give --sweep=FILE")
    try:
        plan = read_json(path)
        runs = [
            _spec(run["name"], run["config"], run["overrides"], run["experiment"], workdir)
            for run in plan["runs"]
        ]
        for run in runs:
            _check_name(run.label, str(path))
        return Sweep(plan["sweep"], tuple(runs), plan["same"])
    except (ConfigError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged or of another version: {error}") from None


def _spec(
    name: str, config: str, overrides: Mapping[str, Any], fields: Mapping[str, Any], workdir: Path
) -> SweepRun:
    experiment = make_experiment(fields)
    return SweepRun(
        method=experiment.adapter.method if experiment.adapter else "none",
        seed=experiment.train.seed,
        directory=workdir / name,
        experiment=experiment,
        label=name,
        config=config,
        overrides=overrides,
    )


def _identity(experiment: ExperimentConfig) -> str:
    """What makes two runs the same. Nothing is trained without an adapter, so there the training does not count."""
    fields = experiment.to_dict()
    if experiment.adapter is None:
        del fields["train"], fields["optimizer"]
    return json.dumps(fields, sort_keys=True)


def _find(path: str) -> Path:
    """A relative path is of the working directory, else of the repository."""
    # os.path says False where pathlib raises: for names that no file can have.
    return Path(path) if os.path.isfile(path) else REPOSITORY / path


def _load(path: str, flag: str) -> dict[str, Any]:
    """The names that a Python file defines."""
    found = _find(path)
    if not os.path.isfile(found):
        raise ConfigError(f"{flag}={path}: no such file")
    try:
        return runpy.run_path(str(found))
    except (Exception, SystemExit) as error:  # the file is a program, and may raise anything
        raise ConfigError(_located(f"{flag}={path}", path, error)) from None


def _call(function: Any, arguments: Sequence[Any], what: str, path: str) -> Any:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{what}: {function.__name__} does not take this: {error}") from None
    try:
        result = function(*arguments)
        if isinstance(result, str | Mapping | ConfigDict) or not isinstance(result, Iterable):
            return result
        return list(result)  # A generator is part of the program.
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except (Exception, SystemExit) as error:  # the file is a program, and may raise anything
        raise ConfigError(_located(what, path, error)) from None


def _located(what: str, path: str, error: BaseException) -> str:
    """The message of an error in a file, with its line there."""
    found = str(_find(path))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == found]
    if isinstance(error, SyntaxError) and error.filename == found:
        lines = [error.lineno]
    where = f", line {lines[-1]}" if lines else ""
    return f"{what}{where}: {type(error).__name__}: {error}"


def _make_run(
    entry: Any,
    default: str | None,
    workdir: Path,
    what: str,
    common: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]],
) -> SweepRun:
    if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
        raise ConfigError(f"{what}: {entry!r} is not allowed: a dictionary of dotted fields")
    # As JSON has it: what is read back later is the same.
    overrides = {field: _plain(value, f"{what}: {field}") for field, value in entry.items()}
    config = overrides.pop(CONFIG_KEY, default)
    if not isinstance(config, str):
        raise ConfigError(f"{what}: has no {CONFIG_KEY!r}, and the file has no CONFIG")
    name = overrides.pop(NAME_KEY, None) or _name(config, overrides)
    _check_name(name, what)
    path, colon, argument = config.partition(":")
    get_config = _load(path, f"{what}: {CONFIG_KEY}").get("get_config")
    if not callable(get_config):
        raise ConfigError(f"{what}: {CONFIG_KEY}={config}: needs a function get_config")
    filled = _call(get_config, [argument] if colon else [], f"{what}: {CONFIG_KEY}={config}", path)
    if not isinstance(filled, ConfigDict):
        raise ConfigError(f"{what}: {CONFIG_KEY}={config}: get_config must return a ConfigDict")
    settings = chosen.get(filled.get("adapter", {}).get("method"), {})
    overrides = {**settings, **overrides, **_plain(dict(common), f"{what}: --set")}
    _override(filled, overrides, what)
    try:
        return _spec(name, config, overrides, filled.to_dict(), workdir)
    except ConfigError as error:
        raise ConfigError(f"{what} ({name}): {error}") from None


def _plain(value: Any, field: str) -> Any:
    def of_numpy(x: Any) -> Any:
        if isinstance(x, np.generic | np.ndarray):
            return x.tolist()
        raise TypeError

    try:
        return json.loads(json.dumps(value, default=of_numpy))
    except (TypeError, ValueError):
        allowed = "a number, a text, true or false, None, or a list or dictionary of them"
        raise ConfigError(f"{field}={value!r} is not allowed: {allowed}") from None


def _check_name(name: Any, what: str) -> None:
    """Raises ConfigError unless a run can be called so: its directory then lies in the sweep's."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if not all(_PART.fullmatch(part) for part in parts):
        raise ConfigError(
            f"{what}: {NAME_KEY}={name!r} is not allowed: letters, digits and . _ + = - in parts"
            " that begin with a letter or digit, joined by /"
        )
    longest = max(parts, key=len)
    if len(longest) > _LONGEST_PART:
        raise ConfigError(
            f"{what}: the name {longest[:40]}... has {len(longest)} characters: at most"
            f" {_LONGEST_PART}; {NAME_KEY!r} gives the run another"
        )
    if parts[0] in _TAKEN or CHECKPOINTS in parts:
        raise ConfigError(f"{what}: {NAME_KEY}={name!r} is not allowed: the sweep's own files")


def _override(config: ConfigDict, overrides: Mapping[str, Any], what: str) -> None:
    for field, value in overrides.items():
        *sections, last = field.split(".")
        holder: Any = config
        for section in sections:
            holder = holder.get(section) if isinstance(holder, ConfigDict) else None
        if not sections and isinstance(config.get(last), ConfigDict):
            raise ConfigError(f"{what}: {field}={value!r}: is a section, write {field}.FIELD")
        if not isinstance(holder, ConfigDict) or last not in holder or not sections:
            fields = ", ".join(holder) if isinstance(holder, ConfigDict) else ", ".join(config)
            raise ConfigError(f"{what}: {field}={value!r}: no such field; there are {fields}")
        # The dataclasses check types, and allow more than the type of the default.
        try:
            with holder.ignore_type():
                holder[last] = value
        except (TypeError, ValueError) as error:  # a mapping whose keys have dots, for example
            raise ConfigError(f"{what}: {field}={value!r} is not allowed: {error}") from None


def _name(config: str, overrides: Mapping[str, Any]) -> str:
    """The config's argument, or else its file, and the overrides, such as sira-rank=8-seed=0."""
    path, _, argument = config.partition(":")
    words = [re.sub(r"[^A-Za-z0-9._+-]", "-", argument) or Path(path).stem]
    for field, value in overrides.items():
        if isinstance(value, list | tuple):
            value = "+".join(map(str, value)) or "empty"
        shown = re.sub(r"[^A-Za-z0-9._+-]", "-", str(value))
        words.append(f"{field.rpartition('.')[2]}={shown}")
    return "-".join(words)


def _check_nesting(runs: Sequence[SweepRun]) -> None:
    names = {run.label for run in runs}
    for name in names:
        parts = name.split("/")
        for i in range(1, len(parts)):
            outer = "/".join(parts[:i])
            if outer in names:
                raise ConfigError(f"the run {name!r} would lie in the directory of {outer!r}")
