"""Any change to any file of a sealed folder is found and named."""

import json
import os

import numpy as np
import pytest

from sira_jax.checkpoints import checksums


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "adapter" / "d").mkdir(parents=True)
    for name in ("adapter/d/a", "adapter/meta", "optimizer", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else random.bytes(5000))
    checksums.write(tmp_path)
    return tmp_path


def test_an_untouched_folder_is_sound(folder):
    assert checksums.problem(folder) is None
    sums = json.loads((folder / checksums.CHECKSUMS).read_text())
    assert set(sums) == {"adapter/d/a", "adapter/meta", "optimizer", "empty"}


@pytest.mark.parametrize("name", ["adapter/d/a", "adapter/meta", "optimizer"])
def test_one_bit_or_one_byte_less_is_found(folder, name):
    content = (folder / name).read_bytes()
    for place in (0, 2500, 4999):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (folder / name).write_bytes(flipped)
        assert checksums.problem(folder) == f"{name} has changed since it was written"
    (folder / name).write_bytes(content[:-1])
    assert checksums.problem(folder) == f"{name} has changed since it was written"
    (folder / name).unlink()
    assert checksums.problem(folder) == f"{name} is missing"
    (folder / name).mkdir()
    assert checksums.problem(folder) == f"{name} cannot be read (Is a directory)"


def test_a_file_grown_from_nothing_is_found(folder):
    (folder / "empty").write_bytes(b"x")
    assert checksums.problem(folder) == "empty has changed since it was written"


def test_only_the_parts_asked_for_are_looked_at(folder):
    (folder / "adapter" / "d" / "a").unlink()
    assert checksums.problem(folder, ["optimizer"]) is None
    assert checksums.problem(folder, ["adapter"]) == "adapter/d/a is missing"


@pytest.mark.parametrize("text", ["", "{", "5", '["ab"]', "\x00\x01", '{"optimizer": "00"}'])
def test_damaged_checksums_are_a_damage(folder, text):
    (folder / checksums.CHECKSUMS).write_text(text)
    assert checksums.problem(folder) is not None


def test_a_folder_of_an_older_version_has_no_checksums(folder):
    (folder / checksums.CHECKSUMS).unlink()
    assert checksums.problem(folder) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_no_damage(folder):
    (folder / "optimizer").chmod(0)
    with pytest.raises(PermissionError):
        checksums.problem(folder)
