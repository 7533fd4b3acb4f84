"""The source of batches as the loop reads it: how long it made the loop wait, and a few attempts where reading fails."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from sira_jax.errors import DataError

ATTEMPTS = 4


class BatchSource(Protocol):
    """An endless source of batches that can be put back to any earlier position."""

    def next_batch(self) -> dict[str, np.ndarray]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class PatientSource:
    """A BatchSource that tries again.

    Args:
      source: what the batches come from. A failed reading is an OSError of its `next_batch`.
      pause: seconds before the second attempt; twice as many before each further one.

    Attributes:
      waited: seconds that the last batch took.
    """

    def __init__(self, source: BatchSource, pause: float = 1.0):
        self._source, self._pause = source, pause
        self.waited = 0.0

    def next_batch(self) -> dict[str, np.ndarray]:
        """The next batch; raises DataError where it cannot be read in ATTEMPTS attempts."""
        start = time.perf_counter()
        position = self._source.state()
        attempt = 1
        while True:
            try:
                batch = self._source.next_batch()
            except OSError as error:
                if attempt == ATTEMPTS:
                    raise DataError(
                        f"the next batch cannot be read in {ATTEMPTS} attempts: {error}"
                    ) from error
                time.sleep(self._pause * 2 ** (attempt - 1))
                # What was read before the failure is read again.
                self._source.restore(position)
                attempt += 1
                continue
            self.waited = time.perf_counter() - start
            return batch

    def state(self) -> dict[str, Any]:
        """The source's."""
        return self._source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """The source's."""
        self._source.restore(state)
