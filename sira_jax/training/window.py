"""What a line of the log is made of: means over the steps since the last one, and their speed."""

import math
import time
from collections.abc import Mapping
from typing import Any


class Window:
    """Means of the steps since the last line of the log, and their speed.

    Its state goes into checkpoints, so that a line whose steps lie on both sides of a kill is the unbroken run's.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._counts: dict[str, int] = dict(state["counts"]) if state else {}
        self._timed_count, self._timed_tokens = 0, 0.0
        self._seconds, self._since = 0.0, time.perf_counter()
        self._waited = 0.0

    def add(self, metrics: Mapping[str, float], waited: float = 0.0) -> None:
        """Takes in a step; `waited` seconds of its time went by waiting for its batch."""
        for name, value in metrics.items():
            # A task that the batch had no tokens of has no value; what must have one is checked before.
            if not math.isnan(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        self._timed_count += 1
        self._waited += waited
        self._timed_tokens += metrics["tokens"]
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now

    def restart_clock(self) -> None:
        """Leaves out the time since the last step, for example of an evaluation."""
        self._since = time.perf_counter()

    def summary(self) -> dict[str, float]:
        """The line's values."""
        values = {f"train/{name}": self._sums[name] / count for name, count in self._counts.items()}
        if self._timed_count:
            values["speed/seconds_per_step"] = self._seconds / self._timed_count
            values["speed/tokens_per_second"] = self._timed_tokens / self._seconds
            values["speed/data_wait_share"] = self._waited / self._seconds
        return values

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data; time that passed before a kill is not part of it."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}
