"""Where a run's numbers go: metrics.jsonl, TensorBoard (through clu) and a progress bar."""

import importlib
import json
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sira_jax import json_text
from sira_jax.files import naming, read_bytes, write_text

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines {"step": ..., name: value, ...} to metrics.jsonl and the same to TensorBoard.

    A line is written by one `write` of the operating system, so that a kill leaves at most one torn line, the last.

    Args:
      directory: the run directory; it exists.
      start_step: step that training starts from. Later lines of an earlier attempt are removed, since their steps are run
        again; lines torn by a kill are removed too.
      tensorboard: also write TensorBoard event files (imports TensorFlow).
    """

    def __init__(self, directory: Path, *, start_step: int = 0, tensorboard: bool = True):
        self._path = Path(directory) / METRICS_FILE
        self.forget_after(start_step)
        self._writer = None
        if tensorboard:
            # clu imports TensorFlow, which takes seconds: only where it is used.
            metric_writers = import_quietly("clu.metric_writers")
            self._writer = metric_writers.SummaryWriter(str(Path(directory) / "tensorboard"))

    def forget_after(self, step: int) -> None:
        """Removes the lines of later steps, which are run again; TensorBoard keeps its own."""
        if self._path.exists():
            kept = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars. Values that are no finite number are written as null, which JSON has.

        Raises StorageError where there is no room.
        """
        values = {name: float(value) for name, value in values.items()}
        shown = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step} | shown) + "\n")
        if self._writer:
            self._writer.write_scalars(step, values)

    def close(self) -> None:
        """Flushes TensorBoard's files."""
        if self._writer:
            self._writer.flush()
            self._writer.close()


class SilentLog:
    """What a process has in the place of MetricsLog that leaves the logs to another."""

    def forget_after(self, step: int) -> None:
        """Nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def import_quietly(name: str) -> types.ModuleType:
    """Imports a module whose native code writes notices to standard error; they are shown only if it fails.

    TensorFlow writes some before its own log level applies.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as notices:
        os.dup2(notices.fileno(), 2)
        try:
            return importlib.import_module(name)
        except BaseException:
            notices.seek(0)
            os.write(saved, notices.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last line, which a kill can leave, is left out."""
    lines = []
    for line in read_bytes(Path(directory) / METRICS_FILE).decode().splitlines():
        try:
            lines.append(json_text.parse(line))
        except json.JSONDecodeError:
            continue
    return lines


class Progress:
    """A bar with loss, tokens a second and the time left, on standard error, and the share of waiting for data from a tenth on.

    Where standard error is no terminal, a line every 30 seconds instead of a redrawn one. Nothing where it is `hidden`.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        unit: str = "step",
        hidden: bool = False,
    ):
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=unit,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=hidden,
            # The bar's own time left, from the mean speed, which an uneven step does not shake.
            smoothing=0.05,
        )
        self._tokens, self._since, self._waited = 0.0, time.perf_counter(), 0.0

    def update(
        self,
        loss: float | None = None,
        tokens: float = 0.0,
        count: int = 1,
        waited: float = 0.0,
    ) -> None:
        """Moves on by `count`, having seen `tokens` tokens and waited for them so many seconds."""
        self._tokens += tokens
        self._waited += waited
        shown = {}
        if loss is not None:
            shown["loss"] = f"{loss:.3f}"
        if self._tokens:
            passed = time.perf_counter() - self._since
            shown["tokens/s"] = f"{self._tokens / passed:.0f}"
            if self._waited > 0.1 * passed:
                shown["waiting for data"] = f"{self._waited / passed:.0%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(count)

    def note(self, text: str) -> None:
        """Writes a line on standard error without breaking the bar; nothing where it is hidden."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def move_back(self, count: int) -> None:
        """Moves back to the first `count`."""
        self._bar.n = count
        self._bar.refresh()

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        self._bar.close()
