"""Downloading data sets from a local file server and from a folder."""

import hashlib
import http.server
import io
import json
import re
import tarfile
import threading

import pytest

from sira_jax.errors import DataError
from tasks import fetch, specs, upstream
from tasks.upstream import DATA_SETS, DataSet, File, download_data_set

CONTENT = bytes(range(256)) * 40
CONTENTS = {"set/a.bin": CONTENT, "set/sub/b.txt": b"hello\n", "set/x.tgz": b""}
MEMBERS = r"(?:.*/)?(parsing)/(train|test)/([a-z]+\.jsonl)"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENTS with ranges; `cut` ends the next answers after so many bytes."""

    cut: list[int] = []  # noqa: RUF012 - set by the tests
    statuses: list[int] = []  # noqa: RUF012 - of the next answers, without content
    requests: list[tuple[str, str | None, int]] = []  # noqa: RUF012
    etag = '"one"'
    ranges = True

    def do_GET(self):
        if self.statuses:
            self.send_error(self.statuses.pop(0))
            return
        content = CONTENTS.get(self.path.removeprefix("/"))
        if content is None:
            self.send_error(404)
            return
        start, wanted = 0, self.headers.get("Range")
        if wanted and self.ranges and self.headers.get("If-Range") == self.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.requests.append((self.path, wanted, start))
        self.send_header("Content-Length", str(len(content) - start))
        if self.etag:
            self.send_header("ETag", self.etag)
        self.end_headers()
        self.wfile.write(content[start:][: self.cut.pop(0) if self.cut else None])

    def log_message(self, *_):
        """Nothing on standard error."""


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Server, "cut", [])
    monkeypatch.setattr(Server, "statuses", [])
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(Server, "requests", [])
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()
    thread.join()


@pytest.fixture
def data_set(server, monkeypatch):
    data = DataSet(
        folder="set",
        licence="MIT",
        terms="https://example.org/terms",
        files=tuple(
            File(url=f"{server}/set/{path}", path=path, git_blob=blob(CONTENTS[f"set/{path}"]))
            for path in ("a.bin", "sub/b.txt")
        ),
    )
    monkeypatch.setattr(upstream, "DATA_SETS", {"data": data})
    return data


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_git_names_are_git_s(tmp_path):
    # What `printf 'hello\n' | git hash-object --stdin` prints.
    (tmp_path / "x").write_bytes(b"hello\n")
    assert fetch.git_blob(tmp_path / "x") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_from_upstream(data_set, tmp_path):
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert folder == tmp_path / "set"
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert files(folder) == {"a.bin", "sub/b.txt", "SOURCE.json"}
    manifest = json.loads((folder / "SOURCE.json").read_text())
    assert manifest["licence"] == "MIT"
    assert manifest["files"]["a.bin"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    # The second time nothing is fetched, nor a licence asked for.
    count = len(Server.requests)
    assert download_data_set("data", data_dir=tmp_path) == folder
    assert len(Server.requests) == count
    # A file that was shortened is fetched again, alone.
    (folder / "a.bin").write_bytes(b"x")
    download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert [path for path, *_ in Server.requests[count:]] == ["/set/a.bin"]
    assert (folder / "a.bin").read_bytes() == CONTENT


def test_the_licence_is_shown_and_must_be_accepted(data_set, tmp_path):
    with pytest.raises(
        DataError, match=r"licence MIT \(https://example\.org/terms\): .*--accept_license=MIT"
    ):
        download_data_set("data", accepted=["CC0-1.0"], data_dir=tmp_path)
    assert not files(tmp_path)
    assert not Server.requests


def test_a_connection_that_breaks_off_is_resumed(data_set, tmp_path):
    Server.cut[:] = [1000, 500]
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert [start for path, _, start in Server.requests if path == "/set/a.bin"] == [0, 1000, 1500]


def test_a_later_call_resumes(data_set, tmp_path):
    Server.cut[:] = [1000, 10, 0]
    with pytest.raises(DataError, match=r"after 3 attempts: .*run again to go on from 1010 bytes"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert "a.bin" not in files(tmp_path / "set")
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert Server.requests[3] == ("/set/a.bin", "bytes=1010-", 1010)
    assert files(folder) == {"a.bin", "sub/b.txt", "SOURCE.json"}


@pytest.mark.parametrize("change", ["etag", "no etag", "no ranges", "weak"])
def test_parts_of_two_versions_are_never_joined(data_set, tmp_path, monkeypatch, change):
    """Where the server has another version by now, or knows of none, or cannot send a rest, all is sent again."""
    if change == "no etag":
        monkeypatch.setattr(Server, "etag", "")
    if change == "weak":
        monkeypatch.setattr(Server, "etag", 'W/"one"')
    Server.cut[:] = [1000, 0, 0] if change != "no etag" else [1000, 1000, 1000]
    kept = 0 if change in ("no etag", "weak") else 1000
    with pytest.raises(DataError, match=f"after 3 attempts: .* from {kept} bytes"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    if change == "etag":
        monkeypatch.setattr(Server, "etag", '"two"')
    if change == "no ranges":
        monkeypatch.setattr(Server, "ranges", False)
    Server.requests.clear()
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert Server.requests[0][2] == 0


def test_another_content_is_refused(data_set, tmp_path, monkeypatch):
    monkeypatch.setitem(CONTENTS, "set/sub/b.txt", b"hellO\n")
    with pytest.raises(DataError, match=r"git name is .*, and must be ce0136"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    # What was right stays; of the wrong file nothing does.
    assert files(tmp_path / "set") == {"a.bin", "SOURCE.json"}
    monkeypatch.setitem(CONTENTS, "set/sub/b.txt", b"hello\n")
    count = len(Server.requests)
    download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert [path for path, *_ in Server.requests[count:]] == ["/set/sub/b.txt"]


def test_missing_files(data_set, tmp_path, monkeypatch):
    monkeypatch.delitem(CONTENTS, "set/a.bin")
    with pytest.raises(DataError, match=r"cannot fetch http.*/set/a\.bin: HTTP status 404"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)


def test_a_busy_server_is_asked_again(data_set, tmp_path):
    Server.statuses[:] = [503, 429]
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert (folder / "a.bin").read_bytes() == CONTENT
    # What does not pass is not asked for again; what does not pass in time is named.
    (folder / "a.bin").unlink()
    Server.statuses[:] = [403, 403]
    with pytest.raises(DataError, match=r"a\.bin: HTTP status 403$"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert Server.statuses == [403]
    Server.statuses[:] = [503, 503, 503]
    with pytest.raises(DataError, match=r"after 3 attempts: HTTP status 503; .* from 0 bytes"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)


def test_nobody_answers(data_set, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"after 3 attempts: .*refused"):
        fetch.fetch("http://127.0.0.1:9/x", tmp_path / "x")


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_mirrors(data_set, server, tmp_path, kind, monkeypatch):
    """Files come from MIRROR/<folder>/<path>; the upstream's address is not asked."""
    gone = [
        File(url="http://127.0.0.1:9/x", path=f.path, git_blob=f.git_blob) for f in data_set.files
    ]
    elsewhere = DataSet(folder="set", licence="MIT", terms="t", files=tuple(gone))
    monkeypatch.setattr(upstream, "DATA_SETS", {"data": elsewhere})
    if kind == "folder":
        for path in ("set/a.bin", "set/sub/b.txt"):
            (tmp_path / "mirror" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "mirror" / path).write_bytes(CONTENTS[path])
    mirror = tmp_path / "mirror" if kind == "folder" else f"{server}/"
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path / "x", mirror=mirror)
    assert (folder / "a.bin").read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"mirror has no file /nowhere/set/a\.bin"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path / "y", mirror="/nowhere")


def archive(contents):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def archived(server, monkeypatch):
    """A data set in one archive without a known checksum."""
    good = {"v1/parsing/train/sw.jsonl": b"1\n", "v1/parsing/test/sw.jsonl": b"2\n"}
    others = {"v1/asr/train/sw.jsonl": b"3", "../parsing/train/../../evil.jsonl": b"4"}
    monkeypatch.setitem(CONTENTS, "set/x.tgz", archive(good | others))
    file = File(url=f"{server}/set/x.tgz", path="x.tgz", git_blob=None, members=MEMBERS)
    data = DataSet(folder="set", licence="MIT", terms="t", files=(file,))
    monkeypatch.setattr(upstream, "DATA_SETS", {"data": data})


def test_only_what_is_needed_is_taken_out_of_an_archive(archived, tmp_path):
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert files(tmp_path) == {
        "set/SOURCE.json",
        "set/parsing/train/sw.jsonl",
        "set/parsing/test/sw.jsonl",
    }
    assert (folder / "parsing/test/sw.jsonl").read_bytes() == b"2\n"
    count = len(Server.requests)
    download_data_set("data", data_dir=tmp_path)
    assert len(Server.requests) == count


def test_a_recorded_checksum_holds_later(archived, tmp_path, monkeypatch):
    folder = download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    (folder / "parsing/test/sw.jsonl").unlink()
    download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert (folder / "parsing/test/sw.jsonl").is_file()
    (folder / "parsing/test/sw.jsonl").unlink()
    monkeypatch.setitem(CONTENTS, "set/x.tgz", archive({"parsing/test/sw.jsonl": b"5"}))
    with pytest.raises(DataError, match=r"SHA-256 recorded at the first download is .* must be"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "is damaged"),
        (archive({"parsing/train/sw.jsonl": bytes(5000)})[:60], "is damaged"),
        (archive({"asr/train/sw.jsonl": b"1"}), "holds no file"),
    ],
    # Of their own: an archive has the time in it, and names that differ between processes stop the suite.
    ids=["no archive", "cut off", "of other data"],
)
def test_bad_archives(archived, tmp_path, monkeypatch, content, message):
    monkeypatch.setitem(CONTENTS, "set/x.tgz", content)
    with pytest.raises(DataError, match=rf"x\.tgz {message}"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)
    assert not files(tmp_path)


def test_names_and_places(data_set, tmp_path):
    with pytest.raises(DataError, match="no data 'other': use one of data"):
        download_data_set("other")
    (tmp_path / "set").write_text("a file")
    with pytest.raises(DataError, match="cannot write"):
        download_data_set("data", accepted=["MIT"], data_dir=tmp_path)


def test_the_true_data_sets():
    """Pinned and checked wherever that can be, in the folders and under the names that the tasks read."""
    for name, data in DATA_SETS.items():
        for file in data.files:
            if name == "xtreme_up":
                assert file.git_blob is None
                continue
            assert re.fullmatch(r"[0-9a-f]{40}", file.git_blob)
            assert re.match(
                r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/", file.url
            )
        assert len({file.path for file in data.files}) == len(data.files)
    with pytest.raises(DataError, match="no address is known for forumsum: put its files into"):
        download_data_set("forumsum", accepted=["see-source"])
    assert len(DATA_SETS["masakhaner_x"].files) == 60


def test_tasks_find_what_is_downloaded(tmp_path, monkeypatch):
    """Each task of a data set looks for files that its data set has."""
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    listed = {f"{d.folder}/{f.path}" for d in DATA_SETS.values() for f in d.files}
    pattern = DATA_SETS["xtreme_up"].files[0].members
    for spec in specs.TASKS.values():
        if not spec.language or spec.name == "forumsum":
            continue
        for split in spec.sizes:
            with pytest.raises(DataError, match="is missing") as caught:
                spec.examples(split)
            path, name = re.search(
                rf"{tmp_path}/(\S+) .*download_data\.py (\w+)`", str(caught.value)
            ).groups()
            assert name in DATA_SETS
            if name == "xtreme_up":
                assert re.fullmatch(pattern, path.removeprefix("xtreme_up/"))
            else:
                assert path in listed
