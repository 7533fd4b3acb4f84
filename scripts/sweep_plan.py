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

from ml_collections import ConfigDict

from scripts import assemble
from scripts.compare_runs import RunSpec, read_json
from sira_jax.errors import ConfigError, DataError, SiraError
from sira_jax.files import write_text
from sira_jax.training.config import ExperimentConfig, make_experiment

REPOSITORY = Path(__file__).resolve().parents[1]
PLAN_FILE = "sweep.json"
# Keys of a run that are no field of the experiment.
CONFIG_KEY, NAME_KEY = "config", "name"
_LONGEST_PART = 200  # directories may have 255 bytes
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


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
    """The runs of a sweep in their order, and the names that were left out -> the run that is the same."""

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
    if isinstance(entries, str | Mapping) or not isinstance(entries, Iterable):
        raise ConfigError(f"--sweep={source}: get_sweep must return a list of dictionaries")
    runs: list[SweepRun] = []
    same: dict[str, str] = {}
    known: dict[str, str] = {}
    for number, entry in enumerate(entries):
        what = f"--sweep={source}, run {number}"
        run = _make_run(entry, module.get("CONFIG"), workdir, what, common or {}, chosen or {})
        if run.label in {r.label for r in runs} | set(same):
            raise ConfigError(f"--sweep={source}: the name {run.label!r} is given to two runs")
        key = _identity(run.experiment)
        if key in known:
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
    workdir.mkdir(parents=True, exist_ok=True)
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


def _load(path: str, flag: str) -> dict[str, Any]:
    """The names that a Python file defines; a relative path is of the working directory, else of the repository."""
    # os.path says False where pathlib raises: for names that no file can have.
    found = Path(path) if os.path.isfile(path) else REPOSITORY / path
    if not os.path.isfile(found):
        raise ConfigError(f"{flag}={path}: no such file")
    try:
        return runpy.run_path(str(found))
    except Exception as error:  # the file is a program, and may raise anything
        raise ConfigError(_located(f"{flag}={path}", str(found), error)) from None


def _call(function: Any, arguments: Sequence[Any], what: str, path: str) -> Any:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{what}: {function.__name__} does not take this: {error}") from None
    try:
        result = function(*arguments)
        return list(result) if inspect.isgenerator(result) else result
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except Exception as error:  # the file is a program, and may raise anything
        raise ConfigError(_located(what, path, error)) from None


def _located(what: str, path: str, error: Exception) -> str:
    """The message of an error in a file, with its line there."""
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(path)
    ]
    if isinstance(error, SyntaxError):
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
    overrides = dict(entry)
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
    overrides = {**chosen.get(filled.adapter.get("method"), {}), **overrides, **common}
    _override(filled, overrides, what)
    # As JSON has it: what is read back later is the same.
    overrides = json.loads(json.dumps(overrides))
    try:
        return _spec(name, config, overrides, filled.to_dict(), workdir)
    except ConfigError as error:
        raise ConfigError(f"{what} ({name}): {error}") from None


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


def _override(config: ConfigDict, overrides: Mapping[str, Any], what: str) -> None:
    for field, value in overrides.items():
        *sections, last = field.split(".")
        holder: Any = config
        for section in sections:
            holder = holder.get(section) if isinstance(holder, ConfigDict) else None
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
