"""Our end of `scripts/torch_worker.py`: starts it and takes turns with it."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sira_jax.errors import DependencyError

_WORKER = Path(__file__).with_name("torch_worker.py")
# Thread pools spin for some milliseconds after their last work; neither side is to pay for the other's.
_PAUSE_SECONDS = 0.05
_ENVIRONMENT = {
    # Waiting threads sleep, so that none takes a core from the other side, and a busy machine does not slow every barrier.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class TorchProcess:
    """A running worker; see `torch_process`.

    Attributes:
      versions: of the packages it uses.
    """

    def __init__(self, process: subprocess.Popen, spec: Mapping[str, Any]):
        self._process = process
        answer = self.ask(spec)
        if "missing" in answer:
            packages = "torch, transformers, peft and mixlora"
            raise DependencyError(
                f"the PyTorch side needs {packages}, and {answer['missing']} is not there: run `make parity-setup`, or name an"
                " interpreter that has them by --torch_python"
            )
        self.versions: dict[str, str] = answer["versions"]

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one line. RuntimeError if the worker has ended; what it died of is on standard error."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the PyTorch process ended with status {self._process.wait()}")
        return json.loads(line)


class TorchSide:
    """One side of a worker, for `timed_step.take_turns`.

    Attributes:
      answers: of all runs, in order.
    """

    def __init__(self, process: TorchProcess, name: str):
        self._process, self._name = process, name
        self.answers: list[dict[str, Any]] = []

    @property
    def cpu_seconds(self) -> list[float]:
        """Of all threads of the worker, for each run."""
        return [answer["cpu_seconds"] for answer in self.answers]

    def run(self) -> float:
        """The seconds of one step or generation, measured in the worker."""
        time.sleep(_PAUSE_SECONDS)
        answer = self._process.ask({"run": self._name})
        time.sleep(_PAUSE_SECONDS)
        self.answers.append(answer)
        return answer["seconds"]


@contextlib.contextmanager
def torch_process(python: str, spec: Mapping[str, Any]) -> Iterator[TorchProcess]:
    """A worker with the sides that `spec` describes, ended at the end.

    Args:
      python: the interpreter.
      spec: see `scripts/torch_worker.py`.

    Raises:
      DependencyError: a package it needs is missing, or there is no such interpreter.
    """
    try:
        process = subprocess.Popen(
            [python, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_ENVIRONMENT | dict(os.environ),
        )
    except OSError as error:
        raise DependencyError(f"--torch_python={python}: {error.strerror}") from None
    try:
        yield TorchProcess(process, spec)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
