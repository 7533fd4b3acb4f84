"""Fetches one file over HTTP, or copies it from a folder, resuming what was cut off.

A part that has arrived stands in `<name>.part`, and what identifies the server's version of the file in
`<name>.part.json`. The next call asks for the rest of that same version; a server that has another, or that cannot
send a rest, sends the whole again.
"""

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from sira_jax.errors import DataError

_CHUNK = 1 << 20
_ATTEMPTS = 3
_TIMEOUT_SECONDS = 60
_PAUSE_SECONDS = 1.0
_OK, _PARTIAL, _RANGE_NOT_SATISFIABLE = 200, 206, 416
# What servers answer while they are too busy or come back.
_PASSING = (408, 429, 500, 502, 503, 504)


def is_url(place: str) -> bool:
    """Whether a place to fetch from is an address and no path."""
    return place.startswith(("http://", "https://"))


def without_file_scheme(place: str) -> str:
    """The path that a file:// address stands for; other places as they are."""
    if not place.startswith("file://"):
        return place
    return urllib.request.url2pathname(urllib.parse.urlsplit(place).path)


def fetch(place: str, target: Path) -> None:
    """Brings the file at `place`, an address or a path, to `target`.

    Raises:
      DataError: it is not there, the server fails, or the connection breaks off again and again; the part that has come stays.
      OSError: `target` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    if not is_url(place):
        if not Path(place).is_file():
            raise DataError(f"mirror has no file {place}")
        shutil.copyfile(place, part)
    else:
        _download(place, part)
    _note(part).unlink(missing_ok=True)
    os.replace(part, target)


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _version(part: Path, url: str) -> str | None:
    """What identifies the version that `part` began with; None where it is of no use."""
    try:
        note = json.loads(_note(part).read_text())
        return note["version"] if note["url"] == url and part.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(url: str, part: Path) -> None:
    reason = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE_SECONDS * attempt)
        try:
            if _transfer(url, part):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code}"
            if error.code == _RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
                reason = "the server has less than the part that is here"
            elif error.code not in _PASSING:
                raise DataError(f"cannot fetch {url}: {reason}") from None
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
    # A part of a version that the server does not name is of no use.
    kept = part.stat().st_size if _version(part, url) else 0
    raise DataError(
        f"cannot fetch {url} after {_ATTEMPTS} attempts: {reason}; run again to go on from"
        f" {kept} bytes, or name a --mirror"
    )


def _transfer(url: str, part: Path) -> bool:
    """One request. Whether the file is complete now."""
    version = _version(part, url)
    start = part.stat().st_size if version else 0
    headers = {"Range": f"bytes={start}-", "If-Range": version} if version else {}
    request = urllib.request.Request(url, headers={"User-Agent": "sira-jax", **headers})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        if response.status not in (_OK, _PARTIAL):
            raise DataError(f"cannot fetch {url}: HTTP status {response.status}")
        if response.status == _OK:
            start = 0
            etag = response.headers.get("ETag", "")
            # A weak ETag may not be used to join parts (RFC 9110, section 13.1.5).
            strong = etag if not etag.startswith("W/") else ""
            note = {"url": url, "version": strong or response.headers.get("Last-Modified")}
            _note(part).write_text(json.dumps(note))
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise DataError(f"cannot fetch {url}: the server sent another range than asked for")
        length = response.headers.get("Content-Length")
        with part.open("r+b" if start else "wb") as sink:
            sink.seek(start)
            sink.truncate()
            while chunk := response.read(_CHUNK):
                sink.write(chunk)
            received = sink.tell() - start
    return length is None or received == int(length)


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob(path: Path) -> str:
    """The name git gives a file's content: the SHA-1 of a header with its size, and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
