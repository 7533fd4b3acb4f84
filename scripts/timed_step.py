"""Timing compiled training steps that take turns, so that a ratio of two times of one round holds on a busy machine."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from sira_jax.training.train_state import TrainState

_WARM_UP = 2


class TimedStep:
    """A compiled training step with its state.

    Args:
      step: the jitted step, which donates its state.
      state: where it starts.
      frozen: parameters of the base.
      batch: what every step is taken on.

    Attributes:
      scratch_bytes: what the compiled step needs besides its arguments and results; None where the backend does not tell.
      state_bytes: of adapter and optimizer.
      cpu_seconds: of all threads of the process, for each step taken.
      first_metrics: of the first step; None before it.
    """

    def __init__(self, step: Any, state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]):
        self._step = step.lower(state, frozen, batch).compile()
        self._state, self._frozen, self._batch = state, frozen, batch
        memory = self._step.memory_analysis()
        self.scratch_bytes = None if memory is None else memory.temp_size_in_bytes
        self.cpu_seconds: list[float] = []
        self.first_metrics: dict[str, Any] | None = None
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def run(self, batch: Mapping[str, jax.Array] | None = None) -> float:
        """Takes one step, on `batch` if it is given, and returns its seconds."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self._state, metrics = self._step(self._state, self._frozen, batch or self._batch)
        jax.block_until_ready((self._state, metrics))
        seconds = time.perf_counter() - start
        self.cpu_seconds.append(time.process_time() - cpu_start)
        self.first_metrics = self.first_metrics or metrics
        return seconds


class Side(Protocol):
    """What can take a turn."""

    def run(self) -> float:
        """Does its work once and returns the seconds."""


def take_turns(steps: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after two rounds in which they settle."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(_WARM_UP + rounds):
        for name, step in steps.items():
            elapsed = step.run()
            if round_index >= _WARM_UP:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of one side's time to another's of the same round."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))
