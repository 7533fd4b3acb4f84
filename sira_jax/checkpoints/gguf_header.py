"""The header of a GGUF file: its metadata and where its tensors are.

The `gguf` package reads the same through a memory map, element by element; this reader takes the
header from the file in order, checks every length against the file's size, and maps nothing.
Source: the GGUF specification of the ggml project, versions 2 and 3 [O].
"""

import dataclasses
import math
import os
import struct
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from sira_jax.checkpoints.model_file import opening
from sira_jax.errors import ModelFileError
from sira_jax.files import open_binary

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SCALARS = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is in the file.

    Attributes:
      shape: rows first, as NumPy and Hugging Face have it (the file lists the fastest axis first).
      kind: how its values are quantised.
      offset: of its first byte, from the start of the file.
      end: the byte after its last one.
      row_bytes: bytes of one row (of one element, if it is a vector).
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    end: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (numbers, strings, lists) and tensors by name."""

    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]


def read_header(path: str) -> GGUFHeader:
    """Returns the header of a GGUF file.

    Raises:
      ModelFileError: if the file is missing, not GGUF, of an unknown version or value type, or
        shorter than its header says.
    """
    with opening(path), open_binary(path) as file:
        return _Reader(path, file).header()


class _Reader:
    def __init__(self, path: str, file: BinaryIO):
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def header(self) -> GGUFHeader:
        magic = self.file.read(4)
        if magic != MAGIC:
            raise ModelFileError(
                f"{self.path}: not a GGUF file: it starts with {magic!r}, not {MAGIC!r}"
            )
        version = self.number("<u4")
        if version not in _VERSIONS:
            raise ModelFileError(
                f"{self.path}: GGUF version {version} is not supported: 2 or 3, little-endian"
            )
        num_tensors, num_fields = self.number("<u8"), self.number("<u8")
        metadata = {}
        for _ in range(self.count(num_fields, 13)):
            key = self.string()
            if key in metadata:
                raise ModelFileError(f"{self.path}: field {key} is there twice")
            metadata[key] = self.value(self.kind(self.number("<u4")))
        infos = [self.tensor_info() for _ in range(self.count(num_tensors, 24))]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ModelFileError(f"{self.path}: general.alignment={alignment!r} must be over 0")
        data_start = -(-self.file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ModelFileError(f"{self.path}: tensor {name} is listed twice")
            tensors[name] = self.tensor(name, shape, kind, data_start + offset)
        self.check_apart(tensors)
        return GGUFHeader(metadata, tensors)

    def check_apart(self, tensors: dict[str, GGUFTensor]) -> None:
        """Raises ModelFileError if two tensors share bytes: a small file could then hold a model of any size."""
        last, end = "", 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].end)):
            if tensor.offset < end:
                raise ModelFileError(f"{self.path}: tensors {last} and {name} overlap")
            last, end = name, tensor.end

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string()
        num_dims = self.number("<u4")
        shape = tuple(self.number("<u8") for _ in range(self.count(num_dims, 8)))[::-1]
        code = self.number("<u4")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise ModelFileError(
                f"{self.path}: tensor {name} has unknown quantisation type {code}"
            ) from None
        return name, shape, kind, self.number("<u8")

    def tensor(self, name: str, shape, kind: GGMLQuantizationType, offset: int) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row = shape[-1] if len(shape) > 1 else 1
        if not shape or row % block:
            raise ModelFileError(
                f"{self.path}: tensor {name} of shape {shape} cannot be of type {kind.name}: rows "
                f"of matrices are blocks of {block}, vectors are not quantised"
            )
        end = offset + math.prod(shape) // block * block_bytes
        if end > self.size:
            raise ModelFileError(
                f"{self.path}: truncated: tensor {name} ends at byte {end}, the file has "
                f"{self.size}"
            )
        return GGUFTensor(shape, kind, offset, end, row // block * block_bytes)

    def value(self, kind: GGUFValueType) -> object:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item_kind = self.kind(self.number("<u4"))
        length = self.number("<u8")
        if item_kind == GGUFValueType.STRING:
            return [self.string() for _ in range(self.count(length, 8))]
        if item_kind == GGUFValueType.ARRAY:
            raise ModelFileError(f"{self.path}: metadata with lists of lists is not supported")
        dtype = _SCALARS[item_kind]
        return np.frombuffer(self.bytes(length * dtype.itemsize), dtype).tolist()

    def kind(self, code: int) -> GGUFValueType:
        try:
            return GGUFValueType(code)
        except ValueError:
            raise ModelFileError(f"{self.path}: unknown metadata type {code}") from None

    def count(self, length: int, least_bytes: int) -> int:
        """Returns `length` if so many items of at least so many bytes fit into the file."""
        if length * least_bytes > self.size:
            raise ModelFileError(
                f"{self.path}: truncated or damaged: {length} items at byte {self.file.tell()} do "
                f"not fit into the file's {self.size} bytes"
            )
        return length

    def number(self, dtype: str | np.dtype) -> int | float | bool:
        dtype = np.dtype(dtype)
        return np.frombuffer(self.bytes(dtype.itemsize), dtype)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.bytes(8))
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError:
            raise ModelFileError(
                f"{self.path}: a string before byte {self.file.tell()} is not UTF-8"
            ) from None

    def bytes(self, length: int) -> bytes:
        data = self.file.read(self.count(length, 1))
        if len(data) != length:
            raise ModelFileError(
                f"{self.path}: truncated: the header goes beyond the file's {self.size} bytes"
            )
        return data
