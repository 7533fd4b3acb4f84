"""Launch configs for tests, programs that stand in for a cluster's, and values that break careless quoting."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

from scripts.launch.config import make_launch

HOSTILE = (
    "two words",
    "it's",
    'a "quoted" word',
    "$HOME ${HOME} $$ $(HOME) $$(HOME)",
    "`touch pwned` $(touch pwned)",
    "; touch pwned & | > pwned",
    "back\\slash \\n",
    "* ? [a-z] ~ {a,b} !x",
    "# no comment",
    "%j %A %i",
    "- : {} [] & * ! | > ' \" %",
    "null",
    "1e3",
    "--dash=it's",
    "",
    "ไทย ñ 🙂",
    "'''",
    "{command} {args.env}",
)

# Writes what it was given, then ends as the file `statuses` says: one exit status a start, "wait" for a run until SIGTERM.
PROGRAM = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
names = json.loads((here / "names.json").read_text())
seen = {"arguments": sys.argv[2:], "env": {n: os.environ.get(n) for n in names}, "directory": os.getcwd()}
with open(here / "seen.jsonl", "a") as file:
    file.write(json.dumps(seen) + "\\n")
statuses = (here / "statuses").read_text().split()
(here / "statuses").write_text(" ".join(statuses[1:] or ["0"]))
if statuses[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waiting").touch()
    time.sleep(60)
    sys.exit(3)
sys.exit(int(statuses[0]))
"""


class Program:
    """A training that records how it was started.

    Args:
      folder: for its files.
      statuses: how it ends, one word a start; see PROGRAM.
      env: names of the variables to record.
    """

    def __init__(self, folder: Path, statuses: str = "0", env=()):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "program.py").write_text(PROGRAM)
        (folder / "names.json").write_text(json.dumps(list(env)))
        (folder / "statuses").write_text(statuses)

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, str(self.folder / "program.py"), str(self.folder))

    @property
    def seen(self) -> list[dict]:
        file = self.folder / "seen.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def waiting(self) -> Path:
        return self.folder / "waiting"


def launch(**sections):
    """A config that every target can render, with changes: job={...}, slurm={...}, ..."""
    config = {
        "job": {
            "name": "a-job",
            "command": ("python", "scripts/train.py", "--config=a.py"),
            "output": "gs://a-bucket/runs",
            "image": "registry.example.org/images/sira-jax:1",
            "checkout": "/shared/checkout",
            "repository": "https://git.example.org/sira_jax.git",
        },
        "google": {
            "project": "a-project",
            "zone": "us-west4-a",
            "cluster": "a-cluster",
            "service_account": "trainer",
        },
    }
    for name, fields in sections.items():
        config[name] = {**config.get(name, {}), **fields}
    return make_launch(config)


def write(folder: Path, files: dict[str, str]) -> None:
    """Writes the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def fake(folder: Path, name: str, script: str) -> None:
    """Puts a program that bash runs into `folder`; it also logs its arguments to calls.jsonl there."""
    folder.mkdir(parents=True, exist_ok=True)
    log = (
        f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {name} \"$@\""
        f' >>"{folder}/calls.jsonl"\n'
    )
    path = folder / name
    path.write_text(f"#!/bin/bash\n{log}{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(folder: Path) -> list[list[str]]:
    """The calls of the fakes in `folder`, the program's name first."""
    file = folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_script(script: Path, *arguments: str, fakes: Path, **env: str) -> subprocess.Popen:
    """Starts a shell script with the fakes before every other program."""
    path = f"{fakes}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(script), *arguments],
        env={**os.environ, "PATH": path, "LAUNCH_PAUSE": "0.05", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
