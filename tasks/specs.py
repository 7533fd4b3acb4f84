"""One definition of each task, from which both the seqio Task and the tokenised arrays come.

Importing this module registers nothing and imports neither TensorFlow nor seqio; `tasks.registry`
puts the same definitions into seqio's registries.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sira_jax.errors import DataError

Example = dict[str, str]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task before any vocabulary.

    Attributes:
      name: unique; letters, digits and underscores.
      description: one line for listings.
      source: from a split's name to its examples, always in the same order. An example holds the
        strings `inputs` and `targets`, and the strings named in `extra_fields`. Raises DataError
        where data are missing or damaged.
      metrics: names in `tasks.metrics.METRICS`.
      sizes: number of examples of each split the task has; None where that is known only once the files are there (`size`
        counts them then).
      extra_fields: further fields of every example, for metrics.
      group: what tasks that differ in language alone share; empty for others.
      language: code of the language; empty where the task is in no mixture of a language.
    """

    name: str
    description: str
    source: Callable[[str], Sequence[Example]]
    metrics: tuple[str, ...]
    sizes: Mapping[str, int | None]
    extra_fields: tuple[str, ...] = ()
    group: str = ""
    language: str = ""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of `split`. Raises DataError for an unknown or empty split."""
        if split not in self.sizes:
            raise DataError(f"split={split!r} of task {self.name}: it has {list(self.sizes)}")
        examples = self.source(split)
        if not examples:
            raise DataError(f"split={split!r} of task {self.name} has no examples")
        return examples

    def size(self, split: str) -> int:
        """Number of examples of `split`, counted where it is not declared. Raises DataError as `examples`."""
        declared = self.sizes.get(split)
        return len(self.examples(split)) if declared is None else declared


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """Tasks drawn together.

    Attributes:
      name: unique among tasks and mixtures.
      description: one line for listings.
      tasks: names of the tasks.
      rates: relative number of examples drawn from each task, one a task.
    """

    name: str
    description: str
    tasks: tuple[str, ...]
    rates: tuple[float, ...]


_TASKS: dict[str, TaskSpec] = {}
_MIXTURES: dict[str, MixtureSpec] = {}
TASKS: Mapping[str, TaskSpec] = MappingProxyType(_TASKS)
MIXTURES: Mapping[str, MixtureSpec] = MappingProxyType(_MIXTURES)


def add_task(spec: TaskSpec) -> TaskSpec:
    """Adds a task. Raises DataError where the name is taken or not a plain identifier."""
    _check_new(spec.name)
    _TASKS[spec.name] = spec
    return spec


def add_mixture(spec: MixtureSpec) -> MixtureSpec:
    """Adds a mixture.

    Raises DataError for a taken name, unknown tasks, or rates that do not fit them.
    """
    _check_new(spec.name)
    if len(spec.rates) != len(spec.tasks) or not spec.tasks:
        raise DataError(f"mixture {spec.name}: {len(spec.rates)} rates for {len(spec.tasks)} tasks")
    if not all(rate > 0 for rate in spec.rates):
        raise DataError(f"mixture {spec.name}: rates={spec.rates} must all be above 0")
    unknown = [name for name in spec.tasks if name not in _TASKS]
    if unknown:
        raise DataError(f"mixture {spec.name}: unknown tasks {unknown}")
    _MIXTURES[spec.name] = spec
    return spec


def _check_new(name: str) -> None:
    if not name.isidentifier():
        raise DataError(f"task name {name!r}: use letters, digits and underscores")
    if name in _TASKS or name in _MIXTURES:
        raise DataError(f"task name {name!r} is taken")


def unknown_name(name: str, known: Iterable[str], what: str = "task or mixture") -> DataError:
    """The error for a name that is not among `known`, with the names close to it."""
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"close names: {', '.join(close)}" if close else "scripts/show_task.py --list names all"
    return DataError(f"no {what} {name!r}: {hint}")


def get_task(name: str) -> TaskSpec:
    """The task `name`. Raises DataError that lists close names."""
    if name not in _TASKS:
        raise unknown_name(name, _TASKS, "task")
    return _TASKS[name]


def members(name: str) -> tuple[tuple[TaskSpec, ...], tuple[float, ...]]:
    """Tasks and rates of a mixture; a task counts as a mixture of itself.

    Raises DataError for other names.
    """
    if name in _TASKS:
        return (_TASKS[name],), (1.0,)
    if name not in _MIXTURES:
        raise unknown_name(name, [*_TASKS, *_MIXTURES])
    mixture = _MIXTURES[name]
    return tuple(_TASKS[task] for task in mixture.tasks), mixture.rates
