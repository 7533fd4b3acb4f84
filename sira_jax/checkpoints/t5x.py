"""Reading checkpoints that T5X wrote in its own format, without T5X.

A checkpoint is a folder (checkpoint_1100000) with a msgpack file `checkpoint`, {"version", "optimizer": {"target": parameters,
"state": ...}}, whose leaves are arrays or, of parameters that were partitioned, a description of a zarr array in a folder
beside it (target.encoder.layers_0.mlp.wo.kernel). Both layouts of T5X's examples are read: layers apart, as in the minimal T5
("encoder/layers_0"), and stacked along axis 1, as in the scalable one ("encoder/encoder"), whose attention has kernels with an
axis of heads besides. Source: t5x/checkpoints.py and t5x/examples [O].
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping

import numpy as np
import tensorstore
from flax import serialization

from sira_jax.checkpoints.base_model import BaseModel
from sira_jax.checkpoints.layout import ShardingFn, load_params
from sira_jax.checkpoints.model_file import opening
from sira_jax.checkpoints.safetensors import read_json
from sira_jax.checkpoints.t5_layout import t5x_layout
from sira_jax.checkpoints.t5_tokenizer import tokenizer_from_spiece
from sira_jax.checkpoints.tokenizer import SpecialTokens
from sira_jax.errors import ModelFileError
from sira_jax.files import read_bytes
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig

CHECKPOINT = "checkpoint"
_OLDEST_VERSION = 2
_SCAN_AXIS = 1
_STEP = re.compile(r"checkpoint_(\d+)")
_CACHED_BYTES = 512 << 20  # of decompressed chunks: a chunk may hold rows of many layers
# What flax and msgpack raise for a damaged file: the arrays in it are packed once more, and not checked.
_MSGPACK_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError, SyntaxError,
)  # fmt: skip
_MOST_LAYERS = 1000  # of a stack: absurd counts are not to be listed
_LARGE_CHUNK = 1 << 20  # values: a chunk of up to so many may be larger than its array
_MOST_NESTED = 100  # of mappings in one another
_TYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of the checkpoint, or one layer of it, as a vector or a matrix.

    Attributes:
      name: what the checkpoint calls it, for messages.
      array: a numpy or tensorstore array.
      layer: index on _SCAN_AXIS, or None for the whole array.
    """

    name: str
    array: object
    layer: int | None

    @property
    def _own_shape(self) -> tuple[int, ...]:
        """Of the layer, before axes are joined."""
        shape = tuple(self.array.shape)
        return shape if self.layer is None else (*shape[:_SCAN_AXIS], *shape[_SCAN_AXIS + 1 :])

    @property
    def _has_heads_first(self) -> bool:
        """(heads, width, out), of the projection "out"; those of the inputs are (in, heads, width)."""
        return len(self._own_shape) == 3 and "/out/" in self.name

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self._own_shape
        if len(shape) != 3:
            return shape
        first, second, third = shape
        return (first * second, third) if self._has_heads_first else (first, second * third)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of the vector or matrix."""
        first, last, width = start, stop, 1
        if self._has_heads_first:
            width = self._own_shape[1]
            first, last = start // width, -(-stop // width)
        found = self.array[first:last]
        if self.layer is not None:
            found = found[:, self.layer]
        if not isinstance(found, np.ndarray):
            found = found.read().result()
        begin = start - first * width
        return found.reshape(-1, *self.shape[1:])[begin : begin + stop - start]


class T5XSource:
    """Parameters of a T5X checkpoint as a TensorSource: under our names, layers apart, in T5X's axes, which are ours.

    Raises:
      ModelFileError: if there is no such file, it is damaged or of another format, or an array is missing or of a type that
        is not supported.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = find_checkpoint(path)
        self._folder = os.path.dirname(self.path)
        self._context = tensorstore.Context(
            {"cache_pool": {"total_bytes_limit": _CACHED_BYTES}, "data_copy_concurrency": {}}
        )
        self._stored: dict[str, _Stored] = {}
        for place, leaf in flatten_specs(_read_target(self.path)).items():
            self._add(place, self._open("/".join(place), leaf))
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}

    def close(self) -> None:
        self._stored = {}

    def stored_name(self, name: str) -> str:
        stored = self._stored.get(name)
        return name if stored is None else stored.name

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        stored = self._stored[name]
        try:
            return stored.rows(start, stop)
        except ValueError as error:
            message = str(error).splitlines()[0]
            raise ModelFileError(f"{self.path}: {stored.name} cannot be read ({message})") from None

    def _add(self, place: tuple[str, ...], array: object) -> None:
        """Puts an array among the others, layer by layer if it is of a scanned stack."""
        name = "/".join(place)
        stack, *inner = place
        if inner[:1] != [stack]:
            self._stored[name] = _Stored(name, array, None)
            return
        if len(array.shape) <= _SCAN_AXIS:
            raise ModelFileError(
                f"{self.path}: {name} of shape {tuple(array.shape)} has no axis {_SCAN_AXIS} of layers"
            )
        num_layers = array.shape[_SCAN_AXIS]
        if num_layers > _MOST_LAYERS:
            raise ModelFileError(
                f"{self.path}: {name} has {num_layers} layers, at most {_MOST_LAYERS}"
            )
        for layer in range(num_layers):
            apart = "/".join((stack, f"layers_{layer}", *inner[1:]))
            self._stored[apart] = _Stored(f"{name} (layer {layer})", array, layer)

    def _open(self, name: str, leaf: object) -> object:
        """The array of a leaf, opened but not read."""
        if isinstance(leaf, np.ndarray):
            array = leaf
        elif isinstance(leaf, Mapping):
            array = self._open_zarr(name, leaf)
        else:
            raise ModelFileError(f"{self.path}: {name} is {type(leaf).__name__}, expected an array")
        dtype = array.dtype.name
        if dtype not in _TYPES:
            raise ModelFileError(
                f"{self.path}: {name} has dtype {dtype}, supported are {', '.join(_TYPES)}"
            )
        return array

    def _open_zarr(self, name: str, spec: Mapping) -> tensorstore.TensorStore:
        store = spec.get("kvstore")
        # Before tensorstore 0.1.14 the path stood beside the kvstore.
        folder = spec.get("path") or (store.get("path") if isinstance(store, Mapping) else None)
        folder = folder.rstrip("/") if isinstance(folder, str) else folder
        # Where the file was written does not matter: a checkpoint's arrays lie beside it, and nothing else is opened.
        is_plain = isinstance(folder, str) and os.path.basename(folder) == folder
        if spec.get("driver") != "zarr" or not is_plain or folder in ("", ".", ".."):
            raise ModelFileError(
                f"{self.path}: {name} must be a zarr array in a folder beside the file, found {dict(spec)!r}"
            )
        place = os.path.join(self._folder, folder)
        if not os.path.exists(os.path.join(place, ".zarray")):
            raise ModelFileError(f"{place}: no such zarr array, which {self.path} names")
        _check_files(place)
        # tensorstore would read it to the end of its stack, however deep it is.
        read_json(os.path.join(place, ".zarray"))
        try:
            array = tensorstore.open(
                {"driver": "zarr", "kvstore": {"driver": "file", "path": place + "/"}},
                context=self._context,
                read=True,
                open=True,
            ).result()
        except ValueError as error:
            message = str(error).splitlines()[0]
            raise ModelFileError(f"{place}: cannot be opened ({message})") from None
        chunk = array.chunk_layout.read_chunk.shape
        if math.prod(chunk) > max(math.prod(array.shape), _LARGE_CHUNK):
            raise ModelFileError(
                f"{place}: has chunks of shape {tuple(chunk)}, larger than the array itself, {tuple(array.shape)}"
            )
        metadata = spec.get("metadata")
        shape = metadata.get("shape") if isinstance(metadata, Mapping) else None
        if shape is not None and list(array.shape) != shape:
            said = tuple(shape) if isinstance(shape, list) else repr(shape)
            raise ModelFileError(
                f"{place}: is of shape {tuple(array.shape)}, but {self.path} says {said}"
            )
        return array


def _check_files(place: str) -> None:
    """Raises ModelFileError if what should be an array's chunks is no file: tensorstore waits at a pipe for ever."""
    with opening(place), os.scandir(place) as entries:
        other = [entry.name for entry in entries if not (entry.is_file() or entry.is_dir())]
    if other:
        raise ModelFileError(f"{os.path.join(place, min(other))}: is no regular file")


def find_checkpoint(path: str | os.PathLike) -> str:
    """The msgpack file of a checkpoint: `path` itself, the one in that folder, or in its newest checkpoint_N.

    Raises:
      ModelFileError: if there is none.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise ModelFileError(f"{path}: no such file or folder")
    if os.path.isfile(os.path.join(path, CHECKPOINT)):
        return os.path.join(path, CHECKPOINT)
    steps = [int(match[1]) for match in map(_STEP.fullmatch, os.listdir(path)) if match]
    newest = [os.path.join(path, f"checkpoint_{step}", CHECKPOINT) for step in sorted(steps)[-1:]]
    if newest and os.path.isfile(newest[0]):
        return newest[0]
    raise ModelFileError(
        f"{path}: no T5X checkpoint: neither a file {CHECKPOINT} nor a folder checkpoint_N with one is there"
    )


def flatten_specs(tree: Mapping) -> dict[tuple[str, ...], object]:
    """Path -> leaf of a nested mapping, in which the description of a zarr array is a leaf."""
    flat: dict[tuple[str, ...], object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not ("driver" in value and "kvstore" in value):
            below = flatten_specs(value)
            flat |= {(key, *path): leaf for path, leaf in below.items()}
        else:
            flat[(key,)] = value
    return flat


def _check_tree(path: str, tree: Mapping) -> None:
    """Raises ModelFileError unless the keys are texts, and mappings in one another few."""
    level = [tree]
    for _ in range(_MOST_NESTED):
        wrong = [key for holder in level for key in holder if not isinstance(key, str)]
        if wrong:
            raise ModelFileError(f"{path}: optimizer.target has the key {wrong[0]!r}, not a text")
        level = [part for holder in level for part in holder.values() if isinstance(part, Mapping)]
        if not level:
            return
    raise ModelFileError(
        f"{path}: optimizer.target has more than {_MOST_NESTED} mappings in one another"
    )


def _read_target(path: str) -> Mapping:
    """The tree of parameters in the msgpack file."""
    with opening(path):
        data = read_bytes(path)
    try:
        content = serialization.msgpack_restore(data)
    except _MSGPACK_ERRORS as error:
        raise ModelFileError(f"{path}: not a msgpack file of T5X ({error})") from None
    if not isinstance(content, Mapping):
        raise ModelFileError(f"{path}: not a T5X checkpoint: it holds a {type(content).__name__}")
    version = content.get("version")
    if type(version) is not int or version < _OLDEST_VERSION:
        raise ModelFileError(
            f"{path}: version={version!r} is not supported: a T5X checkpoint of version {_OLDEST_VERSION} or later"
        )
    optimizer = content.get("optimizer")
    target = optimizer.get("target") if isinstance(optimizer, Mapping) else None
    if not isinstance(target, Mapping) or not target:
        raise ModelFileError(f"{path}: optimizer.target, which holds the parameters, is missing")
    _check_tree(path, target)
    return target


def load_t5x(
    path: str | os.PathLike,
    config: EncoderDecoderConfig,
    *,
    sharding_fn: ShardingFn | None = None,
    spiece: str | os.PathLike | None = None,
) -> BaseModel:
    """Loads the base model of a T5X checkpoint; optimizer state in it is passed over.

    Args:
      path: the checkpoint's folder, its file, or a folder of checkpoints, whose newest is taken.
      config: of the model, for example `presets.preset("t5-1.1-small")`; T5X keeps it in gin files apart from the
        checkpoint. `scan_layers` and `param_dtype` are those of the result, whatever the checkpoint has.
      sharding_fn: see load_params.
      spiece: SentencePiece model of the vocabulary, which a checkpoint does not hold; None for no tokenizer.

    Raises:
      ModelFileError: if the checkpoint is missing, damaged, or its parameters are not those of the config; in one message.
    """
    source = T5XSource(path)
    params = load_params(source, config, sharding_fn, t5x_layout)
    text = None
    if spiece is not None:
        spiece = os.fspath(spiece)
        with opening(spiece):
            data = read_bytes(spiece)
        text = tokenizer_from_spiece(spiece, data, config.vocab_size)
    return BaseModel(
        config=config,
        params=params,
        tokenizer_json=text,
        special=SpecialTokens(eos_ids=(1,), pad_id=0),
        chat_template=None,
        source=source.path,
        tokenizer_error=f"{source.path}: a T5X checkpoint has no tokenizer: give its spiece file",
    )
