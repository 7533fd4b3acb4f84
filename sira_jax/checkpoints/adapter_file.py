"""Our adapter format: a folder with adapter_model.safetensors and adapter_config.json.

The tensors are named by layer ("layers.3.attention.q.lora_a", "encoder.layers.3.attention.query.lora_a";
"layers.3.adapter.router" of a block's own module), whatever the layout of the tree they come from, and are loaded into either
layout. Buffers are among them. The config file holds every field of the adapter's config, the sizes and the fingerprint of its
base, and a version. Both files are data: nothing in them is executed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sira_jax.adapters.base import ADAPTER, STACKED, AdapterConfig, Path, split_layer
from sira_jax.adapters.registry import make_config
from sira_jax.checkpoints import layout
from sira_jax.checkpoints.safetensors import (
    DTYPES,
    SafetensorsFile,
    TensorToWrite,
    read_json,
    write_safetensors,
)
from sira_jax.errors import CheckpointError, ConfigError, ModelFileError
from sira_jax.files import write_text
from sira_jax.models import (
    DecoderConfig,
    EncoderDecoderConfig,
    ModelConfig,
    fresh_adapter,
    make_model,
)
from sira_jax.models.config import DTYPES as MODEL_DTYPES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TYPE = "sira_jax"
VERSION = 1
# Sizes of the base that an adapter's shapes follow from, fields of its config. The first tells a file which config it is of.
SIZES = {
    DecoderConfig: ("num_layers", "emb_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    EncoderDecoderConfig: (
        "num_encoder_layers",
        "num_decoder_layers",
        "emb_dim",
        "num_heads",
        "head_dim",
        "mlp_dim",
    ),
}
_FIELDS = ("type", "version", "adapter", "base")
_BASE_FIELDS = ("fingerprint", "param_dtype")
_PICKLE = "adapter_model.bin"
_LISTED = 3  # tensors named in one message
differences = functools.partial(layout.differences, most=_LISTED)


@dataclasses.dataclass(frozen=True)
class AdapterHeader:
    """What an adapter folder says of itself.

    Attributes:
      config: of the adapter, its method among the fields.
      fingerprint: of the base it was trained on, `checkpoints.fingerprint`.
      param_dtype: type that base was held in.
      sizes: the fields SIZES of the base's config.
    """

    config: AdapterConfig
    fingerprint: str
    param_dtype: str
    sizes: Mapping[str, int]


def tensor_places(adapter: Mapping[str, Any]) -> dict[str, tuple[Path, int | None]]:
    """Name of each tensor in a file -> (path of its leaf, index on the leaf's axis of stacked layers or None), layer by layer.

    Args:
      adapter: the adapter tree of a whole model, layers stacked or apart; arrays or shapes.
    """
    places: dict[tuple, tuple[Path, int | None]] = {}
    for path, leaf in traverse_util.flatten_dict(adapter).items():
        prefix, own_layer, inner = split_layer(path)
        # A projection's leaves need no word between; the leaves of a block's own module keep theirs.
        if inner[0] != ADAPTER:
            inner = tuple(name for name in inner if name != ADAPTER)
        layers = range(leaf.shape[0]) if own_layer is None else [own_layer]
        for layer in layers:
            places[prefix, layer, inner] = (path, layer if own_layer is None else None)
    return {
        ".".join((*prefix, STACKED, str(layer), *inner)): place
        for (prefix, layer, inner), place in sorted(places.items())
    }


def tensor_shapes(adapter: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name of each tensor in a file -> shape; see `tensor_places`."""
    flat = traverse_util.flatten_dict(adapter)
    return {
        name: tuple(flat[path].shape)[layer is not None :]
        for name, (path, layer) in tensor_places(adapter).items()
    }


@functools.lru_cache(maxsize=32)
def abstract_adapter(config: AdapterConfig, model_config: ModelConfig) -> dict[str, Any]:
    """Shapes and types of the adapter tree in the model's layout, without computing any; not to be changed, as it is cached.

    Raises:
      ConfigError: if the adapter's targets match no projection.
    """
    model = make_model(model_config, config)
    return jax.eval_shape(lambda key: fresh_adapter(model, key), jax.random.key(0))


def save_adapter(
    path: str | os.PathLike,
    config: AdapterConfig,
    adapter: Mapping[str, Any],
    model_config: ModelConfig,
    base_fingerprint: str,
) -> None:
    """Writes an adapter folder; a reader finds the old adapter, the new one, or none, never a mixture.

    Args:
      path: the folder; made if it is not there.
      config: of the adapter.
      adapter: its whole tree, buffers included, layers stacked or apart.
      model_config: of the base.
      base_fingerprint: `checkpoints.fingerprint` of the base's parameters.

    Raises:
      CheckpointError: if the tree is not one of this config on this base.
    """
    check_tree(config, adapter, model_config)
    flat = {
        leaf_path: np.asarray(leaf, np.float32)
        for leaf_path, leaf in traverse_util.flatten_dict(adapter).items()
    }
    arrays = {
        name: flat[leaf_path] if layer is None else flat[leaf_path][layer]
        for name, (leaf_path, layer) in tensor_places(adapter).items()
    }
    content = {
        "type": TYPE,
        "version": VERSION,
        "adapter": config.to_dict(),
        "base": {
            "fingerprint": base_fingerprint,
            "param_dtype": model_config.param_dtype,
            **{name: getattr(model_config, name) for name in SIZES[type(model_config)]},
        },
    }
    write_folder(path, content, arrays)


def write_folder(
    path: str | os.PathLike, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; the config, which makes it an adapter, comes last."""
    tensors = [
        TensorToWrite(name, array.shape, array.dtype, lambda array=array: [array])
        for name, array in arrays.items()
    ]
    os.makedirs(path, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # of an adapter that was here before
        os.unlink(os.path.join(path, CONFIG))
    write_safetensors(os.path.join(path, WEIGHTS), tensors)
    write_text(os.path.join(path, CONFIG), json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_tree(
    config: AdapterConfig, adapter: Mapping[str, Any], model_config: ModelConfig
) -> None:
    """Raises CheckpointError unless the tree, in either layout, is one of this config on a base of these sizes."""
    expected = tensor_shapes(abstract_adapter(config, model_config))
    problems = differences(expected, tensor_shapes(adapter))
    if problems:
        raise CheckpointError(f"the adapter's tree does not fit its config: {problems}")


def read_config_file(path: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """(path of adapter_config.json, its fields) of an adapter folder of any format."""
    if not os.path.isdir(path):
        what = "is no folder" if os.path.exists(path) else "no such folder"
        raise ModelFileError(f"{path}: {what}; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    file = os.path.join(path, CONFIG)
    return file, read_json(file)


def read_header(path: str | os.PathLike) -> AdapterHeader:
    """Reads adapter_config.json alone.

    Raises:
      ModelFileError: there is no such folder or file, or it holds no JSON object.
      CheckpointError: it is of another format or version, or a field is missing, unknown or wrong.
    """
    file, content = read_config_file(path)
    if "peft_type" in content:
        raise CheckpointError(
            f"{file}: is a PEFT adapter (peft_type={content['peft_type']!r});"
            " convert it: python scripts/convert.py from-peft"
        )
    if content.get("type") != TYPE:
        raise CheckpointError(f"{file}: type={content.get('type')!r} is not allowed: {TYPE!r}")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"{file}: version={version!r} is not allowed: {VERSION}")
    _check_fields(file, "", content, _FIELDS)
    base = content["base"]
    if not isinstance(base, Mapping):
        raise CheckpointError(f"{file}: base={base!r} is not allowed: an object")
    sizes_of_base = _sizes_of(base)
    _check_fields(file, "base.", base, (*_BASE_FIELDS, *sizes_of_base))
    fingerprint = base["fingerprint"]
    if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise CheckpointError(
            f"{file}: base.fingerprint={fingerprint!r} is not allowed: 64 hexadecimal digits"
        )
    for name in sizes_of_base:
        if type(base[name]) is not int or base[name] < 1:
            raise CheckpointError(
                f"{file}: base.{name}={base[name]!r} is not allowed: a whole number over 0"
            )
    if base["param_dtype"] not in MODEL_DTYPES:
        raise CheckpointError(
            f"{file}: base.param_dtype={base['param_dtype']!r} is not allowed: one of {', '.join(MODEL_DTYPES)}"
        )
    _check_sizes(file, "adapter", content["adapter"])
    try:
        config = make_config(content["adapter"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if config is None:
        raise CheckpointError(f"{file}: adapter.method='none' is not allowed: there is no adapter")
    sizes = {name: base[name] for name in sizes_of_base}
    return AdapterHeader(config, fingerprint, base["param_dtype"], sizes)


def _sizes_of(base: Mapping) -> tuple[str, ...]:
    """The sizes a file has to name: those of the config whose first one it names, of a decoder's if it names none."""
    for names in SIZES.values():
        if names[0] in base:
            return names
    return SIZES[DecoderConfig]


def _check_fields(file: str, where: str, content: Mapping, known: tuple[str, ...]) -> None:
    for name in content:
        if name not in known:
            raise CheckpointError(
                f"{file}: unknown field {where}{name}={content[name]!r}; known are {', '.join(known)}"
            )
    for name in known:
        if name not in content:
            raise CheckpointError(f"{file}: field {where}{name} is missing")


def _check_sizes(file: str, where: str, value: object) -> None:
    """Raises CheckpointError for a number that no array has as a size: JAX fails on some of those without a word of use."""
    if type(value) is int and value >= 2**31:
        raise CheckpointError(f"{file}: {where}={value} is not allowed: under 2**31")
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_sizes(file, f"{where}.{name}", part)
    if isinstance(value, list):
        for part in value:
            _check_sizes(file, where, part)


def load_adapter(
    path: str | os.PathLike, model_config: ModelConfig, base_fingerprint: str
) -> tuple[AdapterConfig, dict[str, Any]]:
    """Reads an adapter folder into the layout of a model.

    Args:
      path: the folder.
      model_config: of the base; its `scan_layers` says whether layers are stacked.
      base_fingerprint: `checkpoints.fingerprint` of the base's parameters.

    Returns:
      (config, adapter tree of float32 arrays on the default device, buffers included).

    Raises:
      ModelFileError: a file is missing or damaged, or its tensors are not those of the config.
      CheckpointError: the config is not of this format or is wrong, or the adapter belongs to another base.
    """
    header = read_header(path)
    check_base(path, header, model_config, base_fingerprint)
    try:
        expected = abstract_adapter(header.config, model_config)
    except ConfigError as error:
        raise CheckpointError(f"{os.path.join(path, CONFIG)}: {error}") from None
    with contextlib.closing(open_weights(path)) as source:
        check_tensors(source, tensor_shapes(expected), ("F32",))
        return header.config, fill(expected, lambda name: read_tensor(source, name))


def fill(shapes: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """An adapter tree in the layout of `shapes`, float32, whose tensors `read` gives by their names in a file."""
    flat = {
        path: np.empty(leaf.shape, np.float32)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    for name, (path, layer) in tensor_places(shapes).items():
        flat[path][... if layer is None else layer] = read(name)
    return traverse_util.unflatten_dict({path: jnp.asarray(x) for path, x in flat.items()})


def check_base(
    path: str | os.PathLike,
    header: AdapterHeader,
    model_config: ModelConfig,
    base_fingerprint: str,
) -> None:
    """Raises CheckpointError if the adapter in the folder `path` was trained on another base."""
    file = os.path.join(path, CONFIG)
    for name, size in header.sizes.items():
        own = getattr(model_config, name, None)  # a base of another kind has no such size
        if size != own:
            raise CheckpointError(f"{file}: base.{name}={size}, but the loaded base has {own}")
    if header.fingerprint != base_fingerprint:
        held = (
            f" (that one was held in {header.param_dtype}, this one is in {model_config.param_dtype})"
            if header.param_dtype != model_config.param_dtype
            else ""
        )
        raise CheckpointError(
            f"{file}: was trained on the base model {header.fingerprint}, the loaded one is"
            f" {base_fingerprint}: an adapter fits its own base only{held}"
        )


def open_weights(path: str | os.PathLike) -> SafetensorsFile:
    """Opens adapter_model.safetensors of a folder; a pickle in its place is named and never opened."""
    file = os.path.join(path, WEIGHTS)
    if not os.path.exists(file) and os.path.exists(os.path.join(path, _PICKLE)):
        raise ModelFileError(
            f"{path}: weights are only in {_PICKLE}, a pickle, which could run code when read and is never opened;"
            f" only {WEIGHTS} is read"
        )
    return SafetensorsFile(file)


def read_tensor(source: SafetensorsFile, name: str) -> np.ndarray:
    """A whole tensor in its stored type."""
    shape = source.shapes[name]
    return source.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)


def check_tensors(
    source: SafetensorsFile, expected: Mapping[str, tuple[int, ...]], dtypes: Iterable[str] = DTYPES
) -> None:
    """Raises ModelFileError, in one message, if a tensor is missing, unexpected, or of another shape or type."""
    problems = differences(expected, source.shapes)
    other = [
        name for name in expected if name in source.shapes and source.dtype(name) not in dtypes
    ]
    if other:
        stored = [f"{name} is {source.dtype(name)}" for name in other]
        allowed = (
            f"tensors of another type than {', '.join(dtypes)}: {layout.listed(stored, _LISTED)}"
        )
        problems = f"{problems}; {allowed}" if problems else allowed
    if problems:
        raise ModelFileError(f"{source.path}: {problems}")
