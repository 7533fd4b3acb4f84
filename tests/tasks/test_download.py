"""Downloading from wheels: complete or not at all, checked, reused."""

import hashlib
import json
import zipfile

import pytest

from sira_jax.errors import DataError
from tasks import download as module
from tasks.download import PACKAGES, Package, cache_root, download

CONTENT = {"pkg/data/a.json": b"[1]\n", "pkg/data/sub/b.json": b"[2]\n", "pkg/evil.py": b"1/0"}


def make_wheel(folder, content=CONTENT, name="pkg-1-py3-none-any.whl"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    digest = make_wheel(tmp_path / "mirror")
    package = Package(
        requirement="pkg==1",
        wheel="pkg-1-py3-none-any.whl",
        sha256=digest,
        licence="MIT",
        members={"pkg/data/a.json": "a.json", "pkg/data/sub/b.json": "sub/b.json"},
    )
    monkeypatch.setattr(module, "PACKAGES", {"pkg": package})
    return tmp_path / "mirror"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_the_named_members_are_taken_out(mirror, tmp_path):
    folder = download("pkg", cache_dir=tmp_path / "cache", mirror=mirror)
    found = files(folder)
    manifest = json.loads(found.pop("SOURCE.json"))
    assert found == {"a.json": b"[1]\n", "sub/b.json": b"[2]\n"}
    assert manifest["licence"] == "MIT"
    assert manifest["requirement"] == "pkg==1"
    # Nothing else is left in the cache.
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pkg"]


def test_the_second_time_nothing_is_fetched(mirror, tmp_path):
    folder = download("pkg", cache_dir=tmp_path / "cache", mirror=mirror)
    stamp = (folder / "a.json").stat().st_mtime_ns
    (mirror / "pkg-1-py3-none-any.whl").unlink()
    assert download("pkg", cache_dir=tmp_path / "cache", mirror=mirror) == folder
    assert (folder / "a.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("damage", ["shorten", "delete", "manifest", "older"])
def test_an_incomplete_folder_is_replaced(mirror, tmp_path, damage):
    folder = download("pkg", cache_dir=tmp_path / "cache", mirror=mirror)
    if damage == "shorten":
        (folder / "a.json").write_bytes(b"[")
    elif damage == "delete":
        (folder / "sub" / "b.json").unlink()
    elif damage == "manifest":
        (folder / "SOURCE.json").write_text("{")
    else:
        (folder / "SOURCE.json").write_text('{"sha256": "0", "sizes": {}}')
    assert download("pkg", cache_dir=tmp_path / "cache", mirror=mirror) == folder
    assert files(folder)["a.json"] == b"[1]\n"
    assert files(folder)["sub/b.json"] == b"[2]\n"


def test_another_wheel_is_refused(mirror, tmp_path):
    cache = tmp_path / "cache"
    folder = download("pkg", cache_dir=cache, mirror=mirror)
    (folder / "a.json").unlink()
    before = files(folder)
    make_wheel(mirror, {**CONTENT, "pkg/data/a.json": b"[3]\n"})
    with pytest.raises(DataError, match=r"sha256=.* is not allowed: it must be"):
        download("pkg", cache_dir=cache, mirror=mirror)
    assert files(folder) == before
    assert [path.name for path in cache.iterdir()] == ["pkg"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(b"no zip"), "is damaged: File is not a zip file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-30]), "is damaged"),
        (
            lambda p: p.write_bytes(p.read_bytes().replace(b"a.json", b"z.json")),
            "There is no item named 'pkg/data/a.json'",
        ),
    ],
)
def test_damaged_wheels_leave_nothing(mirror, tmp_path, monkeypatch, spoil, message):
    wheel = mirror / "pkg-1-py3-none-any.whl"
    spoil(wheel)
    monkeypatch.setattr(module, "_check_sha256", lambda *_: None)
    with pytest.raises(DataError, match=message):
        download("pkg", cache_dir=tmp_path / "cache", mirror=mirror)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_such_wheel_or_name(mirror, tmp_path):
    with pytest.raises(DataError, match=r"has no file pkg-1-py3-none-any\.whl"):
        download("pkg", cache_dir=tmp_path / "cache", mirror=tmp_path)
    with pytest.raises(DataError, match="no data 'other': use one of pkg"):
        download("other", cache_dir=tmp_path / "cache", mirror=mirror)


def test_a_cache_that_cannot_be_written(mirror, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cannot write"):
        download("pkg", cache_dir=tmp_path / "cache", mirror=mirror)


def test_pip_fetches_the_wheel(mirror, tmp_path, monkeypatch):
    """pip itself runs, on a folder instead of an index."""
    meta = "Metadata-Version: 2.1\nName: pkg\nVersion: 1\n"
    content = {
        **CONTENT,
        "pkg-1.dist-info/METADATA": meta.encode(),
        "pkg-1.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "pkg-1.dist-info/RECORD": b"",
    }
    digest = make_wheel(mirror, content)
    package = module.PACKAGES["pkg"]
    fields = {name: getattr(package, name) for name in package.__dataclass_fields__}
    monkeypatch.setattr(module, "PACKAGES", {"pkg": Package(**fields | {"sha256": digest})})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    folder = download("pkg", cache_dir=tmp_path / "cache")
    assert files(folder)["a.json"] == b"[1]\n"
    (mirror / "pkg-1-py3-none-any.whl").unlink()
    with pytest.raises(DataError, match=r"cannot download pkg==1 \(ERROR: .*--mirror"):
        download("pkg", cache_dir=tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SIRA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "sira_jax"


def test_the_real_packages_are_pinned():
    for package in PACKAGES.values():
        assert "==" in package.requirement
        assert len(package.sha256) == 64
        assert package.licence == "Apache-2.0"
        assert all(".." not in name for name in package.members.values())
