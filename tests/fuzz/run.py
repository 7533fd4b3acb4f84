"""Cases of one format in a process of its own, which may die or hang; what came of them."""

import collections
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SILENT_SECONDS = 900  # of a worker that is imported or hangs where no signal reaches it


@dataclasses.dataclass
class Summary:
    """Counts, the most that a case took, and what should not have been."""

    loaded: int = 0
    refused: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    findings: list[str] = dataclasses.field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.loaded + self.refused + len(self.findings)

    def row(self, name: str) -> str:
        """A line of the table in docs/reliability.md."""
        return (
            f"| {name} | {self.cases:,} | {self.loaded:,} | {self.refused:,} | {len(self.findings)}"
            f" | {self.peak_bytes / 2**20:.0f} | {self.seconds:.2f} |"
        )


def fuzz(name: str, first_seed: int, seconds: float) -> Summary:
    """Runs cases from `first_seed` on for about so long; a worker that dies is a finding, and the next seed has its turn."""
    summary = Summary()
    end = time.monotonic() + seconds
    seed = first_seed
    while (left := end - time.monotonic()) > 0:
        last, ended = _run_worker(name, seed, left, summary)
        if ended is None:
            break
        summary.findings.append(f"seed {last}: {ended}")
        if last is None:  # not even one case: it would be so again
            break
        seed = last + 1
    return summary


def _run_worker(
    name: str, seed: int, seconds: float, summary: Summary
) -> tuple[int | None, str | None]:
    """Returns the last seed that was begun, and how the worker ended where it was not as it should."""
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(seed), str(seconds)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "RUST_BACKTRACE": "0",
    }
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors
        )
        last = None
        try:
            for line in _lines(worker):
                record = json.loads(line)
                last = record["seed"]
                if "kind" in record:
                    _count(summary, record)
        except TimeoutError:
            worker.kill()
            worker.wait()
            return last, f"no answer for {_SILENT_SECONDS} s"
        status = worker.wait()
        if status == 0:
            return last, None
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        what = signal.Signals(-status).name if status < 0 else f"status {status}"
        return last, f"the process ended with {what}: {' '.join(text)[:300]}"


def _lines(worker: subprocess.Popen) -> collections.abc.Iterator[bytes]:
    data = b""
    while True:
        if not select.select([worker.stdout], [], [], _SILENT_SECONDS)[0]:
            raise TimeoutError
        part = os.read(worker.stdout.fileno(), 1 << 16)
        if not part:
            return
        *whole, data = (data + part).split(b"\n")
        yield from whole


def _count(summary: Summary, record: dict) -> None:
    summary.peak_bytes = max(summary.peak_bytes, record["peak_bytes"])
    summary.seconds = max(summary.seconds, record["seconds"])
    if record["kind"] == "finding":
        summary.findings.append(f"seed {record['seed']}: {record['detail']} ({record['change']})")
    else:
        setattr(summary, record["kind"], getattr(summary, record["kind"]) + 1)
