"""The input pipeline: an endless, resumable stream of packed batches, and one pass for evaluation.

The stream of examples is a pure function of the seed. Example i's task is drawn by the rates, in
blocks of draws keyed by (seed, block); the k-th example of a task is the (k mod size)-th of a
permutation keyed by (seed, task, k // size), so that every epoch of a task sees each of its
examples once. A batch takes the next examples of the stream in order, first-fit into its B rows,
and ends before the first that fits nowhere; that one begins the next batch. Batches share no state
but the place in the stream, so the state is a handful of counters.

Several processes: the batch size is global. Each process follows the same stream by the examples'
lengths and builds only its own rows.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sira_jax.errors import CheckpointError, DataError, check
from tasks.converters import FeatureConverter
from tasks.features import TOO_LONG_POLICIES, PlacedExample, first_fit
from tasks.loading import TokenizedTask

STATE_VERSION = 1
# Draws of tasks made at once. Part of the stream's definition: another number is another stream.
_BLOCK = 1024
# First entries of the keys of random streams, so that no two purposes share one.
_TASK_DRAWS, _PERMUTATIONS = 0, 1


# What the signature says of the data.
_OF_DATA = ("sizes", "data", "files")


class ChangedDataWarning(UserWarning):
    """A run goes on with other data than it began with."""


def _difference(was_there: bool, is_there: bool) -> str:
    if was_there and is_there:
        return "has changed"
    return "is no longer used" if was_there else "is new"


def _uniform(count: int, *key: int) -> np.ndarray:
    """Numbers of [0, 1), from the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(count)


@dataclass(frozen=True)
class LengthReport:
    """What the length limit did to a task: numbers of examples kept, cut and dropped.

    Attributes:
      task: the task's name.
      kept: with the truncated ones.
      truncated: prompts that lost tokens on their left.
      dropped: examples left out.
    """

    task: str
    kept: int
    truncated: int
    dropped: int

    def __str__(self) -> str:
        return f"{self.task}: {self.kept} kept ({self.truncated} truncated), {self.dropped} dropped"


def _prepare(
    task: TokenizedTask, converter: FeatureConverter, too_long: str
) -> tuple[list[Any], LengthReport]:
    examples, truncated, dropped = [], 0, 0
    for index, (inputs, targets) in enumerate(zip(task.inputs, task.targets, strict=True)):
        try:
            made = converter.make_example(inputs, targets, too_long)
        except DataError as error:
            raise DataError(f"task {task.name}, {task.split} example {index}: {error}") from None
        if made is None:
            dropped += 1
            continue
        example, is_cut = made
        truncated += is_cut
        examples.append(example)
    if not examples:
        limits = " and ".join(f"length={limit}" for limit in converter.limits)
        raise DataError(
            f"task {task.name}: none of its {len(task)} {task.split} examples fits {limits}"
        )
    return examples, LengthReport(task.name, len(examples), truncated, dropped)


def _check_settings(
    tasks: Sequence[TokenizedTask],
    batch_size: int,
    too_long: str,
    rows: Sequence[int] | None,
) -> None:
    if not tasks:
        raise DataError("an input pipeline needs at least one task")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check(too_long in TOO_LONG_POLICIES, "too_long", too_long, "/".join(TOO_LONG_POLICIES))
    if rows is not None:
        ascend = list(rows) == sorted(set(rows))
        within = all(0 <= row < batch_size for row in rows)
        check(
            len(rows) > 0 and ascend and within,
            "rows",
            rows,
            f"ascending ones of the {batch_size} of a batch",
        )


def _place(
    items: Sequence[PlacedExample], rows: Sequence[int], own_rows: Sequence[int]
) -> list[list[PlacedExample]]:
    """The examples of each of `own_rows`; `rows` are those that the items are in."""
    placed: dict[int, list[PlacedExample]] = {row: [] for row in own_rows}
    for item, row in zip(items, rows, strict=True):
        if row in placed:
            placed[row].append(item)
    return list(placed.values())


class InputPipeline:
    """An endless stream of batches over several tasks, deterministic and resumable.

    Args:
      tasks: the tasks; their index is the task id in the batches.
      rates: relative numbers of examples drawn from each task.
      batch_size: B, rows of the global batch.
      converter: makes the features of the model's kind, see `tasks.converters`.
      seed: of the stream, 0 or more.
      pack: several examples a row; False puts one into each.
      shuffle: a new order each epoch; False keeps the tasks' own order (tasks are still drawn at
        random).
      too_long: "error", "drop" or "truncate_inputs", see `tasks.features.make_example`.
      rows: those of the global batch that this process makes, ascending; None for all.
      files: name -> fingerprint of the files that the tasks were read from (`tasks.data_files`), by which `restore` finds
        changed ones.
      allow_changed_data: `restore` takes the place in the stream of other data too, with a warning.

    Attributes:
      reports: what the length limit did, a LengthReport for each task.

    Raises:
      ConfigError: a setting out of range, or rates that do not fit the tasks.
      DataError: no task, an example too long under "error", a task of which no example is left.
    """

    def __init__(
        self,
        tasks: Sequence[TokenizedTask],
        rates: Sequence[float],
        *,
        batch_size: int,
        converter: FeatureConverter,
        seed: int,
        pack: bool = True,
        shuffle: bool = True,
        too_long: str = "error",
        rows: Sequence[int] | None = None,
        files: Mapping[str, str] | None = None,
        allow_changed_data: bool = False,
    ):
        _check_settings(tasks, batch_size, too_long, rows)
        check(seed >= 0, "seed", seed, "0 or more")
        weights = np.asarray(rates, np.float64)
        check(weights.shape == (len(tasks),), "rates", rates, f"one for each of {len(tasks)} tasks")
        fits = bool(np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0)
        check(fits, "rates", rates, "finite numbers of at least 0, not all 0")
        prepared = [_prepare(task, converter, too_long) for task in tasks]
        self.reports = tuple(report for _, report in prepared)
        self._examples = [examples for examples, _ in prepared]
        self._sizes = [len(examples) for examples in self._examples]
        self._edges = np.cumsum(weights / weights.sum())
        self._batch_size, self._converter, self._seed = batch_size, converter, seed
        self._pack, self._shuffle = pack, shuffle
        self._allow_changed_data = allow_changed_data
        self._own_rows = range(batch_size) if rows is None else rows
        self._signature = {
            "tasks": [f"{task.name}/{task.split}" for task in tasks],
            "sizes": self._sizes,
            "data": [task.fingerprint() for task in tasks],
            "files": dict(files or {}),
            "rates": weights.tolist(),
            "batch_size": batch_size,
            "seed": seed,
            "pack": pack,
            "shuffle": shuffle,
            "too_long": too_long,
            **converter.signature(),
        }
        # What is kept of the random streams: one block of draws, one permutation a task.
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._num_batches = 0
        self._num_examples = 0
        self._task_counts = [0] * len(tasks)

    @property
    def num_batches(self) -> int:
        """Batches taken so far."""
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield self.next_batch()

    def _task_of(self, index: int) -> int:
        block, offset = divmod(index, _BLOCK)
        if self._block[0] != block:
            draws = _uniform(_BLOCK, self._seed, _TASK_DRAWS, block)
            chosen = np.searchsorted(self._edges, draws, side="right")
            # Rounding can leave the last edge just under 1; a task at rate 0 is never the answer.
            last = int(np.searchsorted(self._edges, self._edges[-1]))
            self._block = (block, np.minimum(chosen, last))
        return int(self._block[1][offset])

    def _example_of(self, task: int, count: int) -> Any:
        epoch, place = divmod(count, self._sizes[task])
        if self._shuffle:
            if self._orders.get(task, (-1,))[0] != epoch:
                draws = _uniform(self._sizes[task], self._seed, _PERMUTATIONS, task, epoch)
                self._orders[task] = (epoch, np.argsort(draws, kind="stable"))
            place = int(self._orders[task][1][place])
        return self._examples[task][place]

    def _upcoming(self) -> Iterator[PlacedExample]:
        """The examples of the stream from where it stands."""
        counts, index = list(self._task_counts), self._num_examples
        while True:
            task = self._task_of(index)
            yield PlacedExample(self._example_of(task, counts[task]), task)
            counts[task] += 1
            index += 1

    def next_batch(self) -> dict[str, np.ndarray]:
        """This process's rows of the next batch, the converter's features."""
        upcoming, taken = self._upcoming(), []
        if self._pack:

            def lengths() -> Iterator[tuple[int, ...]]:
                for item in upcoming:
                    taken.append(item)
                    yield self._converter.lengths(item.example)

            rows = first_fit(lengths(), self._batch_size, self._converter.limits)
        else:
            rows = list(range(self._batch_size))
            taken = [next(upcoming) for _ in rows]
        items = taken[: len(rows)]
        for item in items:
            self._task_counts[item.task_id] += 1
        self._num_examples += len(items)
        self._num_batches += 1
        return self._converter.pack_rows(_place(items, rows, self._own_rows))

    def state(self) -> dict[str, Any]:
        """The place in the stream and what the stream hangs on, in values fit for JSON."""
        return {
            "version": STATE_VERSION,
            "num_batches": self._num_batches,
            "num_examples": self._num_examples,
            "task_counts": list(self._task_counts),
            "signature": {
                k: list(v) if isinstance(v, list) else v for k, v in self._signature.items()
            },
        }

    def _check_data(self, signature: Mapping[str, Any]) -> None:
        """Raises CheckpointError, or warns, where the data are not those of a state's signature."""
        own = self._signature
        if signature.get("tasks") != own["tasks"]:
            return  # which says more, and is found out next
        # A state of a version that did not know them has no files.
        known = signature.get("files") or own["files"]
        changed = [
            f"data file {name} {_difference(name in known, name in own['files'])}"
            for name in sorted({*known, *own["files"]})
            if known.get(name) != own["files"].get(name)
        ]
        old = list(zip(signature.get("sizes", []), signature.get("data", []), strict=False))
        new = list(zip(own["sizes"], own["data"], strict=True))
        if not changed and old != new:
            names = [n for i, n in enumerate(own["tasks"]) if old[i : i + 1] != new[i : i + 1]]
            changed = [f"the examples of task {name} have changed" for name in names]
        if not changed:
            return
        message = f"{'; '.join(changed)} since the checkpoint was made"
        if not self._allow_changed_data:
            raise CheckpointError(
                f"{message}: bring the old data back, use another --workdir, or go on with the new data with"
                " --allow_changed_data"
            )
        warnings.warn(f"{message}; going on with the new data", ChangedDataWarning, stacklevel=3)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, with the very batches that followed it.

        The number of processes may differ, since the stream is global.

        Raises:
          CheckpointError: `state` is none, or belongs to other tasks, data or settings. The
            pipeline is then unchanged.
        """
        try:
            version, signature = state["version"], dict(state["signature"])
            counters = [state["num_batches"], state["num_examples"], *state["task_counts"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"input pipeline state is incomplete: {error}") from None
        if version != STATE_VERSION:
            raise CheckpointError(
                f"input pipeline state has version {version!r}, not {STATE_VERSION}"
            )
        self._check_data(signature)
        for field, value in self._signature.items():
            if field not in _OF_DATA and signature.get(field) != value:
                raise CheckpointError(
                    f"input pipeline state is of another run: {field} was "
                    f"{signature.get(field)!r}, now it is {value!r}"
                )
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counters)
        num_batches, num_examples, *task_counts = counters
        if (
            not whole
            or len(task_counts) != len(self._task_counts)
            or sum(task_counts) != num_examples
        ):
            raise CheckpointError("input pipeline state is damaged: its counters do not add up")
        self._num_batches, self._num_examples = num_batches, num_examples
        self._task_counts = task_counts


def eval_batches(
    tasks: Sequence[TokenizedTask],
    *,
    batch_size: int,
    converter: FeatureConverter,
    pack: bool = True,
    too_long: str = "error",
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over all examples in their order, each once; rows left over at the end are padding.

    Args and raises: see InputPipeline; errors are raised at the call, before the first batch.
    """
    _check_settings(tasks, batch_size, too_long, rows)
    own_rows = range(batch_size) if rows is None else rows
    items = [
        PlacedExample(example, task_id)
        for task_id, task in enumerate(tasks)
        for example in _prepare(task, converter, too_long)[0]
    ]
    # An example takes a position or more on each side.
    most = batch_size * min(converter.limits)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        start = 0
        while start < len(items):
            rest = items[start:] if not pack else items[start : start + most]
            if pack:
                lengths = (converter.lengths(item.example) for item in rest)
                filled = first_fit(lengths, batch_size, converter.limits)
            else:
                filled = list(range(min(batch_size, len(rest))))
            taken = items[start : start + len(filled)]
            yield converter.pack_rows(_place(taken, filled, own_rows))
            start += len(filled)

    return batches()
