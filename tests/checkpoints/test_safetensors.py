"""The reader and writer of safetensors files against the safetensors library."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sira_jax.checkpoints.safetensors import (
    SafetensorsFile,
    TensorToWrite,
    row_chunks,
    write_atomically,
    write_safetensors,
)
from sira_jax.errors import ModelFileError


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "matrix": rng.normal(size=(7, 5)).astype(np.float32),
        "half": rng.normal(size=(4, 3)).astype(np.float16),
        "brain": rng.normal(size=(6, 2)).astype(ml_dtypes.bfloat16),
        "double": rng.normal(size=(2, 2)),
        "vector": rng.normal(size=(11,)).astype(np.float32),
        "none": np.zeros((0, 3), np.float32),
    }


def test_reads_what_the_library_writes(tmp_path):
    expected = arrays()
    save_file(expected, tmp_path / "a.safetensors")
    file = SafetensorsFile(str(tmp_path / "a.safetensors"))
    assert file.shapes == {name: array.shape for name, array in expected.items()}
    assert file.dtype("brain") == "BF16"
    for name, array in expected.items():
        found = file.read_rows(name, 0, array.shape[0])
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(file.read_rows("matrix", 2, 5), expected["matrix"][2:5])
    np.testing.assert_array_equal(file.read_rows("vector", 3, 4), expected["vector"][3:4])
    file.close()


def test_library_reads_what_is_written(tmp_path):
    expected = arrays()
    path = tmp_path / "a.safetensors"

    def halves(array):
        middle = len(array) // 2
        return lambda: (part for part in (array[:middle], array[middle:]))

    write_safetensors(
        str(path),
        [
            TensorToWrite(name, array.shape, array.dtype, halves(array))
            for name, array in expected.items()
        ],
        {"source": "test"},
    )
    found = load_file(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_chunks_cover_all_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("sira_jax.checkpoints.safetensors._CHUNK_BYTES", 40)
    expected = arrays()
    save_file(expected, tmp_path / "a.safetensors")
    file = SafetensorsFile(str(tmp_path / "a.safetensors"))
    pieces = list(row_chunks(file, "matrix", 1, 7))
    assert [row for row, _ in pieces] == [1, 3, 5]
    np.testing.assert_array_equal(np.concatenate([p for _, p in pieces]), expected["matrix"][1:7])
    file.close()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomically(str(path), fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_chunks_must_add_up(tmp_path):
    short = TensorToWrite("a", (3, 2), np.dtype(np.float32), lambda: [np.zeros((2, 2))])
    with pytest.raises(ValueError, match=r"tensor a: 16 bytes, not 24"):
        write_safetensors(str(tmp_path / "a.safetensors"), [short])
    assert os.listdir(tmp_path) == []


def _file(header: object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(**changes: object) -> dict:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}
BAD = {
    "empty": (b"", "truncated"),
    "short length": (b"\1\2", "truncated"),
    "header beyond the file": (_file(_entry(), length=10**6), "header length 1000000"),
    "huge header": (b"\xff" * 8 + b"{}", "header length"),
    "not JSON": (_file(b"{]"), "not valid JSON"),
    "not UTF-8": (_file(b"\xff\xfe{}"), "not valid JSON"),
    "a list": (_file([]), "header: must hold a JSON object, found list"),
    "nested without end": (_file(b"[" * 100_000), "not valid JSON"),
    "data cut off": (_file(_entry(), data=b"\0" * 12), "truncated: tensor a"),
    "more data than described": (_file(_entry(), data=b"\0" * 20), "its header describes"),
    "wrong byte count": (_file(_entry(shape=[2, 3])), r"tensor a .*\(2, 3\) needs 24 bytes"),
    "no dtype": (_file({"a": {"shape": [1]}}), "tensor a must have dtype"),
    "entry is a number": (_file({"a": 3}), "tensor a must have dtype"),
    "three offsets": (_file(_entry(data_offsets=[0, 8, 16])), "two data_offsets"),
    "unknown dtype": (_file(_entry(dtype="Q4")), "tensor a has unknown dtype 'Q4'"),
    "negative": (_file(_entry(shape=[-2, -2])), "whole numbers"),
    "fraction": (_file(_entry(shape=[2.0, 2])), "whole numbers"),
    "hole": (
        _file({**TWO, "b": {**TWO["b"], "data_offsets": [12, 20]}}, b"\0" * 20),
        "tensor b starts at byte 12 .* expected 8",
    ),
    "overlap": (_file({**TWO, "b": {**TWO["b"], "data_offsets": [4, 12]}}), "overlap"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_clear_error(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        SafetensorsFile(str(path))
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_integers_are_no_weights(tmp_path):
    save_file({"a": np.zeros((2, 2), np.int8)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(str(tmp_path / "a.safetensors"))
    with pytest.raises(ModelFileError, match="tensor a has dtype I8, not F64, F32, F16, BF16"):
        file.read_rows("a", 0, 1)
    file.close()


def test_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match=r"no\.safetensors: no such file"):
        SafetensorsFile(str(tmp_path / "no.safetensors"))
