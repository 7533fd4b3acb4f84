"""Data sets and where they come from: fetches their files into the data folder, checked, once their licence is accepted.

* Files on GitHub are pinned to a commit and checked against the name git gives their content (`tasks.github_files`).
* XTREME-UP's archive has no published checksum. Its SHA-256 is recorded at the first download, in `SOURCE.json`, and
  a later download must have the same.
* Of ForumSum no address is known to this project.

`SOURCE.json` in a data set's folder lists source, licence, files and checksums. A folder counts as complete where
every file it lists has its size.
"""

import json
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sira_jax.errors import DataError
from tasks import fetch
from tasks.github_files import GITHUB
from tasks.reading import data_root

MANIFEST = "SOURCE.json"
_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a data set.

    Attributes:
      url: its address upstream.
      path: in the data set's folder, and in a mirror's.
      git_blob: its git name; None where no checksum is known.
      members: for a tar archive, what is taken out of it: a pattern whose groups, joined by "/", are the path in the folder.
    """

    url: str
    path: str
    git_blob: str | None
    members: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that is fetched from its upstream.

    Attributes:
      folder: in the data folder, as the tasks read it.
      licence: short name, what --accept_license takes.
      terms: where the licence or its statement is.
      files: what is fetched; none where no address is known.
    """

    folder: str
    licence: str
    terms: str
    files: Sequence[File]


def _github(name: str, folder: str, licence: str, terms: str = "") -> DataSet:
    repository, commit, lines = GITHUB[name]
    files = []
    for line in lines.split("\n"):
        if line.strip():
            blob, path, *other = line.split()
            files.append(
                File(
                    url=f"{_RAW}/{repository}/{commit}/{path}",
                    path=other[0] if other else path.rpartition("/")[2],
                    git_blob=blob,
                )
            )
    home = f"https://github.com/{repository}"
    return DataSet(folder=folder, licence=licence, terms=terms or home, files=tuple(files))


DATA_SETS: Mapping[str, DataSet] = {
    "finqa": _github("finqa", "finqa", "MIT"),
    "forumsum": DataSet(
        folder="forumsum",
        licence="see-source",
        terms="https://www.tensorflow.org/datasets/catalog/forumsum",
        files=(),
    ),
    # The repository's licence is that of its code; for the data its readers are sent to the paper.
    "xtreme_up": DataSet(
        folder="xtreme_up",
        licence="see-source",
        terms="https://github.com/google-research/xtreme-up",
        files=(
            File(
                url="https://storage.googleapis.com/xtreme-up/xtreme-up-v1.1.jsonl.tgz",
                path="xtreme-up-v1.1.jsonl.tgz",
                git_blob=None,
                members=r"(?:.*/)?(semantic_parsing|qa_in_lang|qa_cross_lang)"
                r"/(train|validation|test)/([A-Za-z_]+\.jsonl)",
            ),
        ),
    ),
    "masakhaner_x": _github("masakhaner_x", "ner_masakhaner_x", "CC-BY-NC-4.0"),
    "dialogsum": _github("dialogsum", "dialogsum", "CC-BY-NC-SA-4.0"),
    "gsm8k": _github("gsm8k", "gsm8k", "MIT"),
    "snips": _github("snips", "snips", "CC0-1.0"),
    "banking77": _github("banking77", "banking77", "CC-BY-4.0"),
    "mtop": _github("mtop", "mtop_xsemplr", "CC-BY-SA-4.0"),
    "afriqa": _github("afriqa", "afriqa_goldp", "CC-BY-4.0"),
    "bengali_ner": _github("bengali_ner", "ner_bengali", "MIT"),
}


def _manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest if isinstance(manifest.get("files"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _has(folder: Path, name: str, entry: Mapping) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size == entry.get("size")


def is_complete(folder: Path, data_set: DataSet) -> bool:
    """Whether `folder` holds every file of `data_set` at the size it had when it was fetched."""
    listed = _manifest(folder).get("files", {})
    return all(
        file.path in listed
        and all(_has(folder, *item) for item in _contents(file.path, listed[file.path]))
        for file in data_set.files
    )


def _contents(path: str, entry: Mapping) -> list[tuple[str, Mapping]]:
    """The files that a manifest's entry stands for: itself, or what was taken out of the archive."""
    extracted = entry.get("extracted")
    return [(path, entry)] if extracted is None else list(extracted.items())


def download_data_set(
    name: str,
    *,
    accepted: Sequence[str] = (),
    data_dir: str | os.PathLike | None = None,
    mirror: str | os.PathLike | None = None,
) -> Path:
    """Brings the files of a data set into their folder, unless they are there, and returns the folder.

    Args:
      name: a key of DATA_SETS.
      accepted: names of the licences that the user accepts.
      data_dir: parent of the folder; default `tasks.reading.data_root()`.
      mirror: an address or a folder that holds `<folder of the set>/<path of the file>`; default is upstream.

    Raises:
      DataError: unknown name, no known address, a licence that is not accepted, a failed download, a wrong checksum, a
        damaged archive, no room. Files that came before stay, and a part of a file too: calling again goes on from there.
    """
    if name not in DATA_SETS:
        raise DataError(f"no data {name!r}: use one of {', '.join(sorted(DATA_SETS))}")
    data_set = DATA_SETS[name]
    folder = (data_root() if data_dir is None else Path(data_dir).expanduser()) / data_set.folder
    if not data_set.files:
        raise DataError(
            f"no address is known for {name}: put its files into {folder} (docs/data.md)"
        )
    if is_complete(folder, data_set):
        return folder
    if data_set.licence not in accepted:
        raise DataError(
            f"{name} is under the licence {data_set.licence} ({data_set.terms}): read it, and accept"
            f" it with --accept_license={data_set.licence}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _manifest(folder) or {"files": {}}
        manifest |= {"source": data_set.terms, "licence": data_set.licence}
        for file in data_set.files:
            entry = manifest["files"].get(file.path, {})
            if entry and all(_has(folder, *item) for item in _contents(file.path, entry)):
                continue
            place = file.url
            if mirror is not None:
                # Two slashes in an address are another place for most servers.
                place = f"{os.fspath(mirror).rstrip('/')}/{data_set.folder}/{file.path}"
            manifest["files"][file.path] = _bring(place, folder, file, entry)
            _write_manifest(folder, manifest)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error}") from None
    return folder


def _write_manifest(folder: Path, manifest: Mapping) -> None:
    new = folder / f"{MANIFEST}.new"
    new.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(new, folder / MANIFEST)


def _bring(place: str, folder: Path, file: File, earlier: Mapping) -> dict:
    """Fetches one file, checks it, takes it apart where it is an archive. Returns its entry in the manifest."""
    # Under another name until it is checked: a reader never finds a wrong file.
    unchecked = folder / f"{file.path}.unchecked"
    fetch.fetch(place, unchecked)
    try:
        if file.git_blob is not None:
            _check("git name", fetch.git_blob(unchecked), file.git_blob, place)
        sha256 = fetch.sha256(unchecked)
        if file.git_blob is None and "sha256" in earlier:
            _check("SHA-256 recorded at the first download", sha256, earlier["sha256"], place)
        entry = {"url": file.url, "size": unchecked.stat().st_size, "sha256": sha256}
        if file.git_blob is not None:
            entry["git_blob"] = file.git_blob
        if file.members is not None:
            return entry | {"extracted": _extract(unchecked, folder, file.members, place)}
        os.replace(unchecked, folder / file.path)
        return entry
    finally:
        unchecked.unlink(missing_ok=True)


def _check(what: str, actual: str, expected: str, place: str) -> None:
    if actual != expected:
        raise DataError(f"{place}: its {what} is {actual}, and must be {expected}")


def _extract(archive: Path, folder: Path, members: str, place: str) -> dict[str, dict]:
    sizes: dict[str, dict] = {}
    try:
        with (
            tarfile.open(archive, "r:gz") as tar,
            tempfile.TemporaryDirectory(prefix=".tar-", dir=folder) as scratch,
        ):
            for member in tar:
                match = re.fullmatch(members, member.name)
                if match is None or not member.isfile():
                    continue
                # The path is made of the pattern's groups, so that no name in the archive chooses it.
                name = "/".join(match.groups())
                path = Path(scratch) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
                sizes[name] = {"size": path.stat().st_size}
            if not sizes:
                raise DataError(f"{place} holds no file {members}")
            for name in sizes:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch) / name, folder / name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{place} is damaged: {error}") from None
    return sizes
