"""What the flags --adapters and --assign say: which adapters to load from where, and which task uses which."""

import contextlib
import dataclasses
import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import tasks
from scripts import assemble
from sira_jax.adapters import AdapterConfig
from sira_jax.checkpoints import fingerprint
from sira_jax.checkpoints.adapter_file import CONFIG as ADAPTER_CONFIG
from sira_jax.checkpoints.adapter_file import load_adapter
from sira_jax.errors import ConfigError, SiraError
from sira_jax.models import make_model
from sira_jax.training import loop
from sira_jax.training.adapter_bank import BASE, AdapterBank, check_name
from sira_jax.training.evaluate import LossEvaluator


def parse_pairs(flag: str, text: str, value: str) -> list[tuple[str, str]]:
    """The pairs of NAME=VALUE,NAME=VALUE.

    Args:
      flag: what is given them, for messages.
      text: the pairs.
      value: what a value is, for messages.

    Raises:
      ConfigError: a part is no such pair.
    """
    pairs = []
    for part in text.split(","):
        name, _, right = (side.strip() for side in part.partition("="))
        if not name or not right:
            raise ConfigError(f"{flag}: {part.strip()!r} is not allowed: {value}")
        pairs.append((name, right))
    return pairs


def parse_adapters(text: str) -> dict[str, str]:
    """Name -> directory of --adapters.

    Raises:
      ConfigError: it is malformed, or a name is not allowed or there twice.
    """
    directories: dict[str, str] = {}
    for name, directory in parse_pairs("--adapters", text, "NAME=DIR,NAME=DIR"):
        check_name(name)
        if name in directories:
            raise ConfigError(f"--adapters: the name {name!r} is there twice")
        directories[name] = directory
    return directories


def check_known(name: str, names: Iterable[str], where: str) -> None:
    """Raises ConfigError, saying where it stands, unless `name` is one of the adapters or "base"."""
    known = [*names, BASE]
    if name not in known:
        raise ConfigError(
            f"{where}: adapter {name!r} is not among those of --adapters: {', '.join(known)}"
        )


def assign(text: str, task_names: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Task -> adapter of --assign=PATTERN=NAME,...; a pattern is a task's name or has * and ?, and the first that fits counts.

    Raises:
      ConfigError: it is malformed, a name is unknown, a pattern fits no task, or a task has no adapter.
    """
    pairs = parse_pairs("--assign", text, "TASK=NAME,TASK=NAME") if text else []
    names = list(names)
    for pattern, name in pairs:
        check_known(name, names, "--assign")
        if not fnmatch.filter(task_names, pattern):
            raise ConfigError(
                f"--assign: {pattern!r} fits none of the tasks {', '.join(task_names)}"
            )
    assigned = {}
    for task in task_names:
        fitting = [name for pattern, name in pairs if fnmatch.fnmatchcase(task, pattern)]
        if not fitting:
            raise ConfigError(
                f"--assign: task {task} has no adapter; {task}=NAME gives it one, *=NAME all the rest"
            )
        assigned[task] = fitting[0]
    return assigned


def read_experiment(
    config: ConfigDict | None, directories: Mapping[str, str]
) -> assemble.ExperimentConfig:
    """The experiment, without an adapter, that says how to run several: that of --config, or of the first adapter's run.

    Raises:
      ConfigError: the first adapter is no run and there is no --config, or the config is wrong.
    """
    name, directory = next(iter(directories.items()))
    if config is None and _is_folder(directory):
        raise ConfigError(
            f"--config=FILE is needed: {directory} is an adapter folder, which has no sections data and decode"
        )
    if config is None:
        with _naming(name):
            _check_run(directory)
            experiment = assemble.read_experiment(None, directory)
    else:
        experiment = assemble.read_experiment(config, None)
    return dataclasses.replace(experiment, adapter=None)


class Adapters:
    """Adapters loaded by name from run directories and adapter folders.

    Args:
      plan: the experiment that says how to run them.
      frozen: parameters of its base, which must be the one they were trained on.
      which: checkpoint of the run directories, see `assemble.restore_adapter`.

    Attributes:
      bank: what is loaded.
      sources: name -> where it is from: directory, adapter (its config as plain data), checkpoint (the step; None for an
        adapter folder).
    """

    def __init__(self, plan: assemble.Plan, frozen: Any, which: str = "best"):
        self.bank = AdapterBank(plan.base.config, frozen)
        self.sources: dict[str, dict[str, Any]] = {}
        self._plan, self._frozen, self._which = plan, frozen, which

    def load(self, name: str, directory: str) -> None:
        """Loads the adapter of a run directory or an adapter folder.

        Raises:
          SiraError: the name is not allowed or taken, or the directory has no adapter for this base; names the adapter.
        """
        self.bank.check_new(name)
        with _naming(name):
            config, params, step = self._read(directory)
        self.bank.load(name, config, params)
        self.sources[name] = {
            "directory": str(directory),
            "adapter": config.to_dict(),
            "checkpoint": step,
        }

    def unload(self, name: str) -> None:
        """Forgets an adapter; raises ConfigError if it is not loaded."""
        self.bank.unload(name)
        del self.sources[name]

    def _read(self, directory: str) -> tuple[AdapterConfig, Any, int | None]:
        if _is_folder(directory):
            base = self._plan.base.config
            return *load_adapter(directory, base, fingerprint(self._frozen)), None
        _check_run(directory)
        experiment = assemble.read_experiment(None, directory)
        if experiment.adapter is None:
            raise ConfigError(f"{directory}: is a run of the frozen model, it has no adapter")
        layout = self._plan.experiment.model.scan_layers
        if experiment.model.scan_layers != layout:
            raise ConfigError(
                f"{directory}: was trained with model.scan_layers={not layout}, here it is {layout}"
            )
        # The run's own adapter and rule for the best checkpoint, on the base and mesh that are loaded.
        model = make_model(self._plan.base.config, experiment.adapter)
        params, step = assemble.restore_adapter(
            experiment, self._plan.mesh, model, self._frozen, directory, self._which
        )
        return experiment.adapter, params, step

    def decode_tasks(
        self, loaded: Sequence[tasks.TokenizedTask], assigned: Mapping[str, str], description: str
    ) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
        """`Plan.decode_tasks` with the adapter of each task, examples of all tasks together in the batches."""
        ids = [self.bank.index(assigned[task.name]) for task in loaded]
        by_example = np.repeat(ids, [len(task) for task in loaded]).tolist()
        model, params = self.bank.model(), self.bank.params()
        return self._plan.decode_tasks(model, params, loaded, description, by_example)

    def losses(
        self, loaded: Sequence[tasks.TokenizedTask], assigned: Mapping[str, str], prefix: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Teacher-forced losses and the router report (see LossEvaluator) with the adapter of each task."""
        batches = []
        for name in dict.fromkeys(assigned.values()):
            # Apart, since a row may hold examples of several tasks but has one adapter.
            places = [place for place, task in enumerate(loaded) if assigned[task.name] == name]
            for batch in self._plan.eval_batches([loaded[place] for place in places]):
                rows = len(batch["task_ids"])
                batches.append(
                    batch
                    | {
                        "task_ids": np.asarray(places, np.int32)[batch["task_ids"]],
                        "adapter_ids": np.full(rows, self.bank.index(name), np.int32),
                    }
                )
        evaluator = LossEvaluator(
            self.bank.model(len(loaded)),
            self._frozen,
            batches,
            [task.name for task in loaded],
            prefix=prefix,
            loss_chunk_size=self._plan.experiment.train.loss_chunk_size,
        )
        return evaluator.run(self.bank.adapters())


def load_all(
    plan: assemble.Plan, frozen: Any, directories: Mapping[str, str], which: str
) -> Adapters:
    """All adapters of --adapters."""
    adapters = Adapters(plan, frozen, which)
    for name, directory in directories.items():
        adapters.load(name, directory)
    return adapters


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the adapter's name before the message of an error."""
    try:
        yield
    except SiraError as error:
        raise type(error)(f"adapter {name!r}: {error}") from None


def _is_folder(directory: str) -> bool:
    return os.path.isfile(Path(directory) / ADAPTER_CONFIG)


def _check_run(directory: str) -> None:
    if not os.path.isfile(Path(directory) / loop.CONFIG_FILE):
        raise ConfigError(
            f"{directory}: is neither a run directory ({loop.CONFIG_FILE}) nor an adapter folder ({ADAPTER_CONFIG})"
        )
