"""Tensors of GGUF files, dequantised, and the cache of them.

Axis letters: H heads. llama.cpp's converter stores the rows of q and k of architecture `llama`
permuted, for rotary positions on interleaved pairs; the decoder here rotates halves, as Hugging
Face does. The rows are put back while they are read. With the wrong order a model still talks, only
worse, so tests compare both. The other architectures are stored unpermuted. The norms of the gemma
ones are stored with the 1 that is added to their weights; it is taken off. Source: llama.cpp's
conversion script [O].
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import logging
from gguf import GGMLQuantizationType, quants

from sira_jax.checkpoints.gguf_config import ARCHITECTURES, ROPE_FACTORS, read_gguf_config
from sira_jax.checkpoints.gguf_header import read_header
from sira_jax.checkpoints.layout import check_tensors
from sira_jax.checkpoints.safetensors import (
    SafetensorsFile,
    TensorSource,
    TensorToWrite,
    row_chunks,
    write_safetensors,
)
from sira_jax.errors import ModelFileError
from sira_jax.files import open_binary

CACHE_VARIABLE = "SIRA_CACHE"
_CACHE_VERSION = 1  # part of the key: raise it when what is cached changes
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class GGUFSource:
    """Tensors of a GGUF file, dequantised to float32, under Hugging Face names and in its layout.

    Attributes:
      path: the file.
      header: its metadata.
      config: the decoder it describes.
      shapes: shape of every tensor that is a parameter.
    """

    def __init__(self, path: str, **options: object):
        self.path = str(path)
        self.header = read_header(self.path)
        self._file = open_binary(path, buffering=0)
        try:
            self.config = read_gguf_config(self.path, self.header, self._rope_factors(), **options)
        except BaseException:
            self._file.close()
            raise
        self._kind = ARCHITECTURES[self.header.metadata["general.architecture"]]
        names = [name for name in self.header.tensors if name != ROPE_FACTORS]
        self._of = {_hf_name(name, self._kind.block_names): name for name in names}
        self.shapes = {name: self.header.tensors[own].shape for name, own in self._of.items()}

    def close(self) -> None:
        self._file.close()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._kind.has_norms_plus_one and name.endswith("norm.weight"):
            with np.errstate(invalid="ignore"):
                return self._read_stored(self._of[name], start, stop) - np.float32(1)
        if not self._kind.is_permuted or not re.search(r"self_attn\.[qk]_proj\.", name):
            return self._read_stored(self._of[name], start, stop)
        # A row's place changes within its head only: whole heads are read, put in order, cut.
        width = self.config.head_dim
        first, last = start // width * width, -(-stop // width) * width
        rows = unpermute(self._read_stored(self._of[name], first, last), width)
        return rows[start - first : stop - first]

    def stored_name(self, name: str) -> str:
        return _gguf_name(name, self._kind.block_names)

    def _rope_factors(self) -> np.ndarray | None:
        tensor = self.header.tensors.get(ROPE_FACTORS)
        return None if tensor is None else self._read_stored(ROPE_FACTORS, 0, tensor.shape[0])

    def _read_stored(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self.header.tensors[name]
        self._file.seek(tensor.offset + start * tensor.row_bytes)
        wanted = (stop - start) * tensor.row_bytes
        data = bytearray(wanted)
        view = memoryview(data)
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise ModelFileError(f"{self.path}: truncated while tensor {name} was read")
            view = view[count:]
        rows = np.frombuffer(data, np.uint8).reshape(stop - start, tensor.row_bytes)
        if tensor.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            stored = rows.view("<f4" if tensor.kind == GGMLQuantizationType.F32 else "<f2")
            return stored.reshape(stop - start, *tensor.shape[1:])
        try:
            # Scales may be infinite or NaN; the values are then too, and no line beside the progress bar says so.
            with np.errstate(over="ignore", invalid="ignore"):
                values = quants.dequantize(rows, tensor.kind)
            return values.reshape(stop - start, *tensor.shape[1:])
        except NotImplementedError:
            raise ModelFileError(
                f"{self.path}: tensor {name} has quantisation type {tensor.kind.name}, which the "
                f"gguf package does not dequantise"
            ) from None


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns whole heads' rows (H * head_dim, ...) from interleaved pairs back to halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str, block_names: Mapping[str, str]) -> str:
    """The inverse of _hf_name."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
    if match:
        own = {hf: gguf for gguf, hf in block_names.items()}.get(match[2], match[2])
        return f"blk.{match[1]}.{own}.{match[3]}"
    return {hf: gguf for gguf, hf in _NAMES.items()}.get(name, name)


def _hf_name(name: str, block_names: Mapping[str, str]) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in block_names:
        return f"model.layers.{int(match[1])}.{block_names[match[2]]}.{match[3]}"
    return _NAMES.get(name, name)


def default_cache_dir() -> str:
    """Returns $SIRA_CACHE, or ~/.cache/sira_jax."""
    path = os.environ.get(CACHE_VARIABLE) or os.path.join("~", ".cache", "sira_jax")
    return os.path.expanduser(path)


def dequantised(source: GGUFSource, cache_dir: str | None = None) -> TensorSource:
    """Returns the tensors of a GGUF file from the cache, which is filled on first use.

    The key is the file's SHA-256 and the type the parameters are held in. A damaged cache file is
    written anew. Where the cache cannot be written, a warning is logged and `source` is returned,
    which dequantises as it is read.

    Raises:
      ModelFileError: if the tensors do not fit the config, before anything is written.
    """
    check_tensors(source, source.config)
    dtype = source.config.param_dtype
    folder = os.path.join(cache_dir or default_cache_dir(), "gguf")
    name = f"{_sha256(source.path)}-{dtype}-v{_CACHE_VERSION}.safetensors"
    path = os.path.join(folder, name)
    if os.path.exists(path):
        try:
            return _open_cached(path, source)
        except ModelFileError as error:
            logging.warning("The cached model is damaged and is written anew: %s", error)
    try:
        os.makedirs(folder, exist_ok=True)
        write_safetensors(path, _tensors_to_write(source, jax.numpy.dtype(dtype)))
    except OSError as error:
        logging.warning("The dequantised model cannot be cached in %s: %s", folder, error)
        return source
    return _open_cached(path, source)


def _open_cached(path: str, source: GGUFSource) -> SafetensorsFile:
    cached = SafetensorsFile(path)
    try:
        check_tensors(cached, source.config)
    except BaseException:
        cached.close()
        raise
    return cached


def _tensors_to_write(source: GGUFSource, dtype: np.dtype) -> Iterator[TensorToWrite]:
    for name, shape in source.shapes.items():

        def chunks(name: str = name) -> Iterator[np.ndarray]:
            return (rows for _, rows in row_chunks(source, name))

        yield TensorToWrite(name, shape, dtype, chunks)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
