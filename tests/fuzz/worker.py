"""A process that runs cases of one format and prints a line for each, first its seed and then what came of it.

python -m tests.fuzz.worker FORMAT FIRST_SEED SECONDS
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.cases import limited_memory, run_case, seed_folders
from tests.fuzz.targets import TARGETS, real_targets

EXTRA_BYTES = 1 << 30


def main(name: str, first: int, seconds: float) -> None:
    target = (TARGETS | real_targets())[name]
    memory = (
        "/dev/shm" if os.path.isdir("/dev/shm") else None
    )  # no disk need turn for a file of a moment
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-", dir=memory) as folder:
        root = Path(folder)
        sound = seed_folders(target, root / "sound")
        for path in sound:  # sound they are, and what is loaded once is loaded
            target.load(path)
        end = time.monotonic() + seconds
        seed = first
        with limited_memory(EXTRA_BYTES):
            while time.monotonic() < end:
                print(json.dumps({"seed": seed}), flush=True)
                outcome = run_case(target, sound, seed, root / "case")
                print(json.dumps({"seed": seed} | dataclasses.asdict(outcome)), flush=True)
                seed += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
