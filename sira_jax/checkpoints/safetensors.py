"""Reading and writing safetensors files a few rows at a time.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data, without holes. Source: the format description of the safetensors project [O].

Rows are read with plain file reads, not through a memory map: the mapped pages of a file count in
the process's resident memory, and a model would be held twice.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from sira_jax import json_text
from sira_jax.checkpoints.model_file import opening
from sira_jax.errors import ModelFileError
from sira_jax.files import open_binary, read_bytes, write_atomically

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4,
    "I64": 8, "U64": 8, "C64": 8, **{name: dtype.itemsize for name, dtype in DTYPES.items()},
}  # fmt: skip
_TOO_LARGE = 2**63  # for a shape or an offset
_LONGEST_HEADER = 100_000_000  # the format's own limit
_CHUNK_BYTES = 4 << 20

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorSource(Protocol):
    """Tensors of a model under their Hugging Face names, in Hugging Face layout (rows are output
    features).

    Attributes:
      path: the file or folder, for messages.
      shapes: shape of every tensor.
    """

    path: str
    shapes: Mapping[str, tuple[int, ...]]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows start:stop of a tensor (elements start:stop of a vector)."""

    def stored_name(self, name: str) -> str:
        """Returns what the file itself calls a tensor, for messages."""


def row_chunks(
    source: TensorSource, name: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) of tensor `name` in pieces of about 4 MB of float32, from `start` to
    `stop`.
    """
    shape = source.shapes[name]
    stop = shape[0] if stop is None else stop
    step = max(1, _CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for row in range(start, stop, step):
        yield row, source.read_rows(name, row, min(row + step, stop))


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # offset in the file
    end: int


def read_json(path: str) -> dict:
    """Returns the JSON object in a file; ModelFileError if it is missing, not JSON or not an
    object.
    """
    with opening(path):
        text = read_bytes(path)
    return parse_json(path, text)


def parse_json(what: str, text: str | bytes, unique_keys: bool = False) -> dict:
    """Returns the JSON object in a text; `what` names it in the ModelFileError if it is none."""
    try:
        content = json_text.parse(text, unique_keys=unique_keys)
    except ValueError as error:
        raise ModelFileError(f"{what}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{what}: must hold a JSON object, found {type(content).__name__}")
    return content


class SafetensorsFile:
    """One open safetensors file: a TensorSource whose header has been checked against the file's
    size.

    Raises:
      ModelFileError: if the file is missing, truncated, or its header is not of the format.
    """

    def __init__(self, path: str):
        self.path = str(path)
        with opening(path):
            self._file = open_binary(path, buffering=0)
        try:
            self._entries = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def close(self) -> None:
        self._file.close()

    def dtype(self, name: str) -> str:
        """Returns the stored type's name in the format, such as "BF16"."""
        return self._entries[name].dtype

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        entry = self._entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ModelFileError(
                f"{self.path}: tensor {name} has dtype {entry.dtype}, not {', '.join(DTYPES)}"
            )
        row_shape = entry.shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        data = np.empty((stop - start, *row_shape), dtype)
        self._file.seek(entry.begin + start * row_bytes)
        _read_into(self._file, data, self.path)
        return data

    def stored_name(self, name: str) -> str:
        return name

    def _read_header(self) -> dict[str, _Entry]:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        if len(prefix) < 8:
            raise ModelFileError(f"{self.path}: truncated, {size} bytes is no safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ModelFileError(
                f"{self.path}: truncated or not a safetensors file: header length {length} goes "
                f"beyond the file's {size} bytes or the format's limit of {_LONGEST_HEADER}"
            )
        header = parse_json(f"{self.path}: header", self._file.read(length), unique_keys=True)
        header.pop("__metadata__", None)
        data_start = 8 + length
        entries = {
            name: self._check_entry(name, fields, data_start, size)
            for name, fields in header.items()
        }
        end = data_start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                raise ModelFileError(
                    f"{self.path}: tensor {name} starts at byte {entry.begin - data_start} of the "
                    f"data, expected {end - data_start} (tensors overlap or leave a hole)"
                )
            end = entry.end
        if end != size:
            raise ModelFileError(
                f"{self.path}: the file has {size} bytes, its header describes {end}"
            )
        return entries

    def _check_entry(self, name: str, fields: object, data_start: int, size: int) -> _Entry:
        try:
            dtype, shape, (begin, end) = (
                fields["dtype"],
                tuple(fields["shape"]),
                fields["data_offsets"],
            )
        except (TypeError, KeyError, ValueError):
            raise ModelFileError(
                f"{self.path}: header entry of tensor {name} must have dtype, shape and two "
                f"data_offsets, found {fields!r}"
            ) from None
        numbers = (*shape, begin, end)
        if any(type(number) is not int or not 0 <= number < _TOO_LARGE for number in numbers):
            raise ModelFileError(
                f"{self.path}: shape and data_offsets of tensor {name} must be whole numbers under "
                f"2**63, found {fields!r}"
            )
        if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
            raise ModelFileError(f"{self.path}: tensor {name} has unknown dtype {dtype!r}")
        needed = math.prod(shape) * _ITEM_SIZES[dtype]
        if end - begin != needed:
            raise ModelFileError(
                f"{self.path}: tensor {name} of dtype {dtype} and shape {shape} needs {needed} "
                f"bytes, its data_offsets give {end - begin}"
            )
        if data_start + end > size:
            raise ModelFileError(
                f"{self.path}: truncated: tensor {name} ends at byte {data_start + end}, the file "
                f"has {size}"
            )
        return _Entry(dtype, shape, data_start + begin, data_start + end)


class SafetensorsFolder:
    """The safetensors weights of a Hugging Face folder, in one file or in the shards an index
    names.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._of: dict[str, SafetensorsFile] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: file.shapes[name] for name, file in self._of.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._of[name].read_rows(name, start, stop)

    def stored_name(self, name: str) -> str:
        return name

    def _open(self) -> None:
        if os.path.exists(os.path.join(self.path, WEIGHTS)):
            self._add_file(WEIGHTS)
            return
        index_path = os.path.join(self.path, INDEX)
        if not os.path.exists(index_path):
            raise ModelFileError(_no_weights(self.path))
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{index_path}: field weight_map is missing or empty")
        for name, file_name in weight_map.items():
            is_plain = isinstance(file_name, str) and os.path.basename(file_name) == file_name
            if not is_plain or file_name in ("", ".", ".."):
                raise ModelFileError(
                    f"{index_path}: weight_map[{name!r}]={file_name!r} must be the name of a file "
                    f"in the folder"
                )
            if file_name not in self._files:
                self._add_file(file_name)
            if name not in self._files[file_name].shapes:
                raise ModelFileError(
                    f"{os.path.join(self.path, file_name)}: missing tensor {name}, which {INDEX} "
                    f"places there"
                )

    def _add_file(self, file_name: str) -> None:
        file = SafetensorsFile(os.path.join(self.path, file_name))
        self._files[file_name] = file
        for name in file.shapes:
            if name in self._of:
                raise ModelFileError(
                    f"{self.path}: tensor {name} is in {os.path.basename(self._of[name].path)} and "
                    f"in {file_name}"
                )
            self._of[name] = file


def _no_weights(path: str) -> str:
    names = sorted(os.listdir(path))
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{path}: weights are only in {pickled[0]}, a pickle, which could run code when read "
            f"and is never opened; convert the model to safetensors (transformers: save_pretrained)"
        )
    return f"{path}: no weights: neither {WEIGHTS} nor {INDEX} is there"


def _read_into(file, data: np.ndarray, path: str) -> None:
    view = memoryview(data.reshape(-1).view(np.uint8))
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ModelFileError(f"{path}: truncated while it was read")
        view = view[count:]


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor's name, shape, dtype and a function that yields its data as arrays in order.

    The arrays together hold `shape`'s elements; they are converted to `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to `path`, one chunk at a time; the file appears whole or not at all.

    Raises:
      ValueError: if a tensor's chunks do not add up to its shape, or its dtype is not one of
        DTYPES.
      OSError: if the file cannot be written.
    """
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {tensor.name} has dtype {tensor.dtype}, not one of {DTYPES}")
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes

    def write(file) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk, dtype=tensor.dtype)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
                written += data.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"tensor {tensor.name}: {written} bytes, not {tensor.nbytes}")

    write_atomically(path, write)
