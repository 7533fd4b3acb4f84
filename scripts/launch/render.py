"""Renders the files that start a training run on a cluster; runs nothing unless told.

  python scripts/launch/render.py --config=configs/launch/starter.py --target=slurm --out=launch/slurm
  python scripts/launch/render.py --config=configs/launch/starter.py --target=gke --dry_run
  bash launch/slurm/submit.sh

Targets: slurm, gke, tpu_vm, xpk, xmanager (docs/launch.md). --dry_run checks the files and writes none.
"""

import subprocess
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from scripts.cli import run_main
from scripts.launch.check_files import check_files
from scripts.launch.config import make_launch
from scripts.launch.script import START
from scripts.launch.targets import TARGETS
from sira_jax.errors import ConfigError
from sira_jax.files import write_text

CONFIG = config_flags.DEFINE_config_file("config", None, "The launch, a file in configs/launch/.")
TARGET = flags.DEFINE_enum("target", None, list(TARGETS), f"One of {', '.join(TARGETS)}.")
OUT = flags.DEFINE_string("out", None, "Where the files go; files of the same names are replaced.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the files here, and write none.")
RUN = flags.DEFINE_bool("run", False, f"Start {START} after writing.")


def main(argv: list[str]) -> int:
    """Renders; returns the exit status."""
    del argv
    if CONFIG.value is None:
        raise ConfigError("--config=FILE is needed: a launch config, as in configs/launch/")
    if TARGET.value is None:
        raise ConfigError(f"--target is needed: one of {', '.join(TARGETS)}")
    if RUN.value and DRY_RUN.value:
        raise ConfigError("--run and --dry_run exclude each other")
    files = TARGETS[TARGET.value](make_launch(CONFIG.value.to_dict()))
    if DRY_RUN.value:
        print("\n".join(check_files(files)))
        return 0
    if not OUT.value:
        raise ConfigError("--out=DIR is needed, or --dry_run")
    out = Path(OUT.value)
    write_files(files, out)
    if not RUN.value:
        print(f"bash {out / START} starts it")
        return 0
    return subprocess.run(["bash", str(out / START)], check=False).returncode


def write_files(files: dict[str, str], out: Path) -> None:
    """Writes the files into `out`, shell scripts executable, and prints their paths.

    Raises:
      ConfigError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(out / name, text)
            (out / name).chmod(0o755 if name.endswith(".sh") else 0o644)
            print(out / name)
    except OSError as error:
        raise ConfigError(f"--out={out}: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
