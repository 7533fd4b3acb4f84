"""Checks of rendered files that need neither a cluster nor its tools.

Shell scripts are read by `bash -n`, the options of sbatch by a table of those that we use, YAML by a JSON schema of the part of
the JobSet API that we use (jobset.schema.json), Python by the compiler.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path, PurePath
from typing import Any

import yaml

from sira_jax.errors import ConfigError

_SCHEMA = Path(__file__).parent / "jobset.schema.json"
_COUNT = re.compile(r"[1-9]\d*")
_WORD = re.compile(r"[\w.,&|*()\[\]-]+")
# The options that sbatch may be given, and what their values look like; None: it has no value.
_SBATCH = {
    "job-name": re.compile(r"[a-z0-9-]+"),
    "output": re.compile(r"/[\w./=@+%-]+"),
    "open-mode": re.compile(r"append|truncate"),
    "requeue": None,
    "signal": re.compile(r"B:TERM@[1-9]\d*"),
    "nodes": _COUNT,
    "ntasks-per-node": _COUNT,
    "gpus-per-node": _COUNT,
    "cpus-per-task": _COUNT,
    "mem": re.compile(r"\d+[KMGT]?"),
    "time": re.compile(r"[\d:-]+"),
    "partition": _WORD,
    "account": _WORD,
    "qos": _WORD,
    "constraint": _WORD,
    "array": re.compile(r"0-\d+(%[1-9]\d*)?"),
}


def check_files(files: dict[str, str]) -> list[str]:
    """What was checked, one line a file.

    Raises:
      ConfigError: a file is not what it should be; names the file and the mistake.
    """
    lines = []
    for name, text in files.items():
        done = [what for what, check in _CHECKS[PurePath(name).suffix] if check(name, text) is None]
        lines.append(f"{name}: {', '.join(done)}")
    return lines


def _bash(name: str, text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise ConfigError(f"{name}: bash -n: {done.stderr.strip()}")


def sbatch_options(text: str) -> dict[str, str | None]:
    """The options that sbatch takes from a script: those of the lines before the first command."""
    options: dict[str, str | None] = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH "), comments=True):
                option, _, value = word.removeprefix("--").partition("=")
                options[option] = value if "=" in word else None
        elif line.strip() and not line.startswith("#"):
            break
    return options


def _sbatch(name: str, text: str) -> None:
    options = sbatch_options(text)
    written = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    if len(options) != len(written):
        raise ConfigError(f"{name}: sbatch reads {len(options)} of {len(written)} options")
    for option, value in options.items():
        if option not in _SBATCH:
            raise ConfigError(f"{name}: #SBATCH --{option}: not an option that is used here")
        pattern = _SBATCH[option]
        if (pattern is None) != (value is None) or (pattern and not pattern.fullmatch(value)):
            raise ConfigError(f"{name}: #SBATCH --{option}={value}: not a value of this option")


def _parse_yaml(name: str, text: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {error}") from None


def _jobset(name: str, text: str) -> None:
    # Only this check needs the package, and only developers install it.
    try:
        import fastjsonschema
    except ImportError:
        raise ConfigError(
            f"{name}: its check needs the package fastjsonschema: pip install -e '.[test]'"
        ) from None
    validate = fastjsonschema.compile(json.loads(_SCHEMA.read_text()), use_default=False)
    for document in _parse_yaml(name, text):
        try:
            validate(document)
        except fastjsonschema.JsonSchemaException as error:
            raise ConfigError(f"{name}: {error.message}") from None


def _python(name: str, text: str) -> None:
    try:
        compile(text, name, "exec")
    except SyntaxError as error:
        raise ConfigError(f"{name}: {error}") from None


_CHECKS = {
    ".sh": [("bash -n", _bash)],
    ".sbatch": [("bash -n", _bash), ("options of sbatch", _sbatch)],
    ".yaml": [("schema of JobSet", _jobset)],
    ".py": [("compiles", _python)],
}
