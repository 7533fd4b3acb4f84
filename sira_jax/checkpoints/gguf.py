"""GGUF files of the llama and qwen2 architectures: config, special tokens and dequantised tensors.

Axis letters: H heads. llama.cpp's converter stores the rows of q and k of architecture `llama`
permuted, for rotary positions on interleaved pairs; the decoder here rotates halves, as Hugging
Face does. The rows are put back while they are read. With the wrong order a model still talks, only
worse, so tests compare both. Architecture `qwen2` is stored unpermuted. Source: llama.cpp's
conversion script [O].
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from gguf import GGMLQuantizationType, quants

from sira_jax.checkpoints.gguf_header import GGUFHeader, read_header
from sira_jax.checkpoints.hf_config import make_config
from sira_jax.checkpoints.layout import check_tensors
from sira_jax.checkpoints.safetensors import (
    SafetensorsFile,
    TensorSource,
    TensorToWrite,
    row_chunks,
    write_safetensors,
)
from sira_jax.errors import ModelFileError
from sira_jax.models.config import DecoderConfig, RopeScaling

ARCHITECTURES = ("llama", "qwen2")
CACHE_VARIABLE = "SIRA_CACHE"
_CACHE_VERSION = 1  # part of the key: raise it when what is cached changes
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


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
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as this object
        try:
            self.config = read_gguf_config(self.path, self.header, self._rope_factors(), **options)
        except BaseException:
            self._file.close()
            raise
        self._of = {_hf_name(name): name for name in self.header.tensors if name != _ROPE_FACTORS}
        self.shapes = {name: self.header.tensors[own].shape for name, own in self._of.items()}
        self._permuted = re.compile(r"self_attn\.[qk]_proj\.") if self._is_llama else None

    def close(self) -> None:
        self._file.close()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._permuted is None or not self._permuted.search(name):
            return self._read_stored(self._of[name], start, stop)
        # A row's place changes within its head only: whole heads are read, put in order, cut.
        width = self.config.head_dim
        first, last = start // width * width, -(-stop // width) * width
        rows = unpermute(self._read_stored(self._of[name], first, last), width)
        return rows[start - first : stop - first]

    def stored_name(self, name: str) -> str:
        return _gguf_name(name)

    @property
    def _is_llama(self) -> bool:
        return self.header.metadata["general.architecture"] == "llama"

    def _rope_factors(self) -> np.ndarray | None:
        tensor = self.header.tensors.get(_ROPE_FACTORS)
        return None if tensor is None else self._read_stored(_ROPE_FACTORS, 0, tensor.shape[0])

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
            return quants.dequantize(rows, tensor.kind).reshape(stop - start, *tensor.shape[1:])
        except NotImplementedError:
            raise ModelFileError(
                f"{self.path}: tensor {name} has quantisation type {tensor.kind.name}, which the "
                f"gguf package does not dequantise"
            ) from None


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns whole heads' rows (H * head_dim, ...) from interleaved pairs back to halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    """The inverse of _hf_name."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
    if match:
        own = {hf: gguf for gguf, hf in _BLOCK_NAMES.items()}.get(match[2], match[2])
        return f"blk.{match[1]}.{own}.{match[3]}"
    return {hf: gguf for gguf, hf in _NAMES.items()}.get(name, name)


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{int(match[1])}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    return _NAMES.get(name, name)


def read_gguf_config(
    path: str, header: GGUFHeader, rope_factors: np.ndarray | None, **options: object
) -> DecoderConfig:
    """Returns the DecoderConfig that a GGUF header describes.

    Args:
      path: for messages.
      header: of the file.
      rope_factors: values of the tensor rope_freqs.weight, or None if there is none.
      **options: fields of DecoderConfig that a file does not give.

    Raises:
      ModelFileError: naming the field, if one is missing or not supported.
    """
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelFileError(
            f"{path}: general.architecture={arch!r} is not supported: one of "
            f"{', '.join(ARCHITECTURES)}"
        )

    def get(key: str, default: object = None) -> object:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise ModelFileError(f"{path}: field {arch}.{key} is missing")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one value a layer, all equal
        if isinstance(value, list | str | bool):
            raise ModelFileError(f"{path}: {arch}.{key}={value!r} must be one number")
        return value

    def number(key: str, default: float | None = None) -> float:
        # The file holds float32; its shortest decimal form is the number that was meant (1e-5).
        value = float(str(np.float32(get(key, default))))
        if not math.isfinite(value) or value <= 0:
            raise ModelFileError(f"{path}: {arch}.{key}={value!r} must be a number over 0")
        return value

    for key, allowed in (("expert_count", 0), ("attention.sliding_window", 0)):
        if get(key, allowed) != allowed:
            raise ModelFileError(
                f"{path}: {arch}.{key}={get(key)!r} is not supported: a dense model with full "
                f"attention"
            )
    num_heads, emb_dim = get("attention.head_count"), get("embedding_length")
    if num_heads < 1:
        raise ModelFileError(f"{path}: {arch}.attention.head_count={num_heads!r} must be over 0")
    head_dim = get("attention.key_length", emb_dim // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ModelFileError(
                f"{path}: {arch}.{key}={get(key)!r} is not supported: the head's width {head_dim}"
            )
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" and (scaling != "linear" or number("rope.scaling.factor", 1.0) != 1.0):
        raise ModelFileError(f"{path}: {arch}.rope.scaling.type={scaling!r} is not supported: none")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{path}: missing tensors: token_embd.weight")
    theta = number("rope.freq_base", 10000.0)
    return make_config(
        path,
        vocab_size=embedding.shape[0],
        emb_dim=emb_dim,
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_dim=get("feed_forward_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(
            path,
            rope_factors,
            theta,
            head_dim,
            int(get("rope.scaling.original_context_length", 8192)),
        ),
        tie_embeddings="output.weight" not in header.tensors,
        qkv_bias=arch == "qwen2",
        max_positions=get("context_length"),
        **options,
    )


def _rope_scaling(
    path: str, factors: np.ndarray | None, theta: float, head_dim: int, original: int
) -> RopeScaling | None:
    """Returns the Llama-3 scaling whose divisors of the frequencies the file holds as a tensor."""
    if factors is None or np.all(factors == 1):
        return None
    # The published Llama 3.1 to 3.3 configs all have low 1, high 4 and 8192 positions.
    scaling = RopeScaling(factor=max(1.0, float(factors.max())), original_max_positions=original)
    if factors.shape != (head_dim // 2,) or not np.allclose(
        factors, rope_divisors(scaling, theta, head_dim), rtol=1e-3
    ):
        raise ModelFileError(
            f"{path}: tensor {_ROPE_FACTORS} is not supported: it is not Llama 3's scaling with "
            f"factor {scaling.factor}, low_freq_factor 1, high_freq_factor 4, {original} positions"
        )
    return scaling


def rope_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Returns what Llama 3's scaling divides each rotary frequency by, (head_dim / 2,) in float64.

    Source: Llama 3.1's reference implementation, as in transformers' `rope_type` "llama3" [O].
    """
    wave_lengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wave_lengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


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
