"""Loading a frozen base model from a Hugging Face folder or a GGUF file, and writing such a folder.

Nothing that is read is executed: weights come from safetensors or GGUF, never from pickles, and a
chat template is returned as text.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import tokenizers

from sira_jax.checkpoints.folder_tokenizer import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_optional_json,
    read_text,
    read_tokenizer,
)
from sira_jax.checkpoints.gguf import GGUFSource, dequantised
from sira_jax.checkpoints.gguf_header import MAGIC
from sira_jax.checkpoints.hf_config import CONFIG
from sira_jax.checkpoints.hf_models import read_model_config, write_model_config
from sira_jax.checkpoints.layout import Leaf, ShardingFn, flatten, leaves, load_params
from sira_jax.checkpoints.model_file import opening
from sira_jax.checkpoints.safetensors import (
    INDEX,
    WEIGHTS,
    SafetensorsFolder,
    TensorToWrite,
    read_json,
    write_safetensors,
)
from sira_jax.checkpoints.text_part import text_part
from sira_jax.checkpoints.tokenizer import (
    SpecialTokens,
    added_token_id,
    parse_tokenizer,
    special_tokens_from_gguf,
    tokenizer_from_gguf,
)
from sira_jax.errors import ModelFileError
from sira_jax.files import open_binary, write_text
from sira_jax.models import EncoderDecoderConfig, ModelConfig

_GENERATION_CONFIG = "generation_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_DECODER_START = "decoder_start_token_id"
_CHUNK_ROWS = 4096
# Ids of models whose files name none.
_DEFAULT_IDS = {EncoderDecoderConfig: {"eos": 1, "pad": 0}}


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen language model and what is needed to feed it.

    Attributes:
      config: shape and options of the model.
      params: the tree for `make_model(config).apply({"params": params}, batch)`.
      tokenizer_json: text of a Hugging Face tokenizer.json, None if there is none.
      special: ids for generation and padding.
      chat_template: Jinja text of the chat format, None if there is none.
      source: path it was loaded from.
      tokenizer_error: why `tokenizer_json` is None.
    """

    config: ModelConfig
    params: dict
    tokenizer_json: str | None
    special: SpecialTokens
    chat_template: str | None
    source: str
    tokenizer_error: str | None = None

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer; ModelFileError if the model has none that is supported."""
        if self.tokenizer_json is None:
            raise ModelFileError(self.tokenizer_error or f"{self.source}: no tokenizer")
        return parse_tokenizer(self.source, self.tokenizer_json)


def load_base_model(
    path: str | os.PathLike,
    *,
    param_dtype: str = "float32",
    dtype: str = "float32",
    scan_layers: bool = True,
    remat_policy: str = "none",
    sharding_fn: ShardingFn | None = None,
    quantization: str = "none",
    cache_dir: str | None = None,
) -> BaseModel:
    """Loads a base model; host memory peaks little above the size of the parameters.

    Args:
      path: a Hugging Face folder (config.json, safetensors in one file or in shards,
        tokenizer.json) of a model_type that docs/models.md lists, or a GGUF file of an architecture
        listed there. Of a Gemma 3 that reads images, the language model is loaded.
      param_dtype: type the parameters are held in: float32, bfloat16 or float16.
      dtype: type of the computation.
      scan_layers: stack the layers' parameters along axis 0.
      remat_policy: see DecoderConfig.
      sharding_fn: (path in the tree, shape) -> jax.sharding.Sharding or None; see load_params.
      quantization: how the projections' matrices are held, see `quantized`; param_dtype is then that of the rest.
      cache_dir: where dequantised GGUF files are kept; default $SIRA_CACHE or ~/.cache/sira_jax.

    Raises:
      ModelFileError: one line that names the file and the field or the tensors at fault.
    """
    path = os.fspath(path)
    options = {
        "param_dtype": param_dtype,
        "dtype": dtype,
        "scan_layers": scan_layers,
        "remat_policy": remat_policy,
    }
    if _is_gguf(path):
        with contextlib.closing(GGUFSource(path, **options)) as source:
            tensors = dequantised(source, cache_dir)
            with contextlib.closing(tensors):
                params = load_params(tensors, source.config, sharding_fn, quantization=quantization)
            return _describe_gguf(source, params)
    config = read_model_config(path, **options)
    with contextlib.closing(SafetensorsFolder(path)) as tensors:
        params = load_params(text_part(tensors), config, sharding_fn, quantization=quantization)
    return _describe_folder(path, config, params)


def read_base_model(path: str | os.PathLike, **options: object) -> BaseModel:
    """Returns the same as `load_base_model` without weights: `params` is empty. Cheap.

    Args:
      path: as in load_base_model.
      **options: fields of its config that a checkpoint does not give.
    """
    path = os.fspath(path)
    if _is_gguf(path):
        with contextlib.closing(GGUFSource(path, **options)) as source:
            return _describe_gguf(source, {})
    return _describe_folder(path, read_model_config(path, **options), {})


def read_config(path: str | os.PathLike, **options: object) -> tuple[ModelConfig, SpecialTokens]:
    """Returns a model's config and special tokens without reading its weights."""
    model = read_base_model(path, **options)
    return model.config, model.special


def _is_gguf(path: str) -> bool:
    if os.path.isdir(path):
        return False
    if not os.path.exists(path):
        raise ModelFileError(f"{path}: no such file or folder")
    with opening(path), open_binary(path) as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC and not path.lower().endswith(".gguf"):
        raise ModelFileError(
            f"{path}: neither a GGUF file nor a folder; of a Hugging Face model, give the folder"
        )
    return True


def _describe_gguf(source: GGUFSource, params: dict) -> BaseModel:
    metadata = source.header.metadata
    text = error = None
    try:
        text = tokenizer_from_gguf(source.path, metadata)
    except ModelFileError as reason:
        error = str(reason)  # the model can be used without: raised when it is asked for
    template = metadata.get("tokenizer.chat_template")
    return BaseModel(
        config=source.config,
        params=params,
        tokenizer_json=text,
        special=special_tokens_from_gguf(metadata, source.config.vocab_size),
        chat_template=template if isinstance(template, str) else None,
        source=source.path,
        tokenizer_error=error,
    )


def _describe_folder(path: str, config: ModelConfig, params: dict) -> BaseModel:
    text = error = None
    try:
        text = read_tokenizer(path, config.vocab_size)
    except ModelFileError as reason:
        error = str(reason)  # the model can be used without: raised when it is asked for
    return BaseModel(
        config=config,
        params=params,
        tokenizer_json=text,
        special=_read_special_tokens(path, text, config),
        chat_template=_read_chat_template(path),
        source=path,
        tokenizer_error=error,
    )


def _read_special_tokens(
    path: str, tokenizer_json: str | None, config: ModelConfig
) -> SpecialTokens:
    """The generation config wins over config.json, and both over the tokenizer's own names."""
    vocab_size, defaults = config.vocab_size, _DEFAULT_IDS.get(type(config), {})
    sources = [read_optional_json(path, _GENERATION_CONFIG), read_json(os.path.join(path, CONFIG))]
    names = read_optional_json(path, TOKENIZER_CONFIG)

    def find(name: str) -> tuple[int, ...]:
        for source in sources:
            value = source.get(f"{name}_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(index) is not int for index in ids):
                raise ModelFileError(
                    f"{path}: {name}_token_id={value!r} must be a whole number or a list of them"
                )
            # Some published configs name ids that the model has no embedding for, such as -1.
            ids = [index for index in ids if 0 <= index < vocab_size]
            if ids:
                return tuple(dict.fromkeys(ids))
        index = added_token_id(tokenizer_json, names.get(f"{name}_token"))
        index = index if index is not None and 0 <= index < vocab_size else None
        index = defaults.get(name) if index is None else index
        return () if index is None else (index,)

    bos, pad = find("bos"), find("pad")
    return SpecialTokens(
        bos_id=bos[0] if bos else None,
        eos_ids=find("eos"),
        pad_id=pad[0] if pad else None,
    )


def _read_chat_template(path: str) -> str | None:
    text = read_text(path, _CHAT_TEMPLATE)
    if text is not None:
        return text
    template = read_optional_json(path, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, by name
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        named = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def save_hf_folder(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping,
    tokenizer_json: str | None = None,
    special: SpecialTokens | None = None,
    chat_template: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face folder that this package and transformers load.

    Args:
      path: the folder; made if it is not there, files of the same names are replaced.
      config: of the model; its fields say which model_type is written.
      params: the model's plain parameters, without adapters; each is written in its own type.
      tokenizer_json: text of tokenizer.json.
      special: ids for generation_config.json.
      chat_template: Jinja text for tokenizer_config.json.
      max_shard_bytes: a weights file never holds more, unless one tensor does.

    Raises:
      ModelFileError: if the parameters are not those of the config, for example unmerged adapters,
        or if no model_type describes the config.
    """
    path = os.fspath(path)
    special = special or SpecialTokens()
    described = write_model_config(config)
    shards = _shards(list(_tensors_to_write(config, params)), max_shard_bytes)
    os.makedirs(path, exist_ok=True)
    if len(shards) == 1:
        write_safetensors(os.path.join(path, WEIGHTS), shards[0])
        with contextlib.suppress(FileNotFoundError):  # of a model that was here before
            os.unlink(os.path.join(path, INDEX))
    else:
        names = [
            f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(os.path.join(path, name), shard)
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        _write_json(path, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, WEIGHTS))
    ids = {
        "bos_token_id": special.bos_id,
        "eos_token_id": list(special.eos_ids) or None,
        "pad_token_id": special.pad_id,
    }
    if _DECODER_START in described:  # transformers looks for it in either file
        ids[_DECODER_START] = described[_DECODER_START]
    _write_json(path, _GENERATION_CONFIG, ids)
    if tokenizer_json is not None:
        write_text(os.path.join(path, TOKENIZER), tokenizer_json)
        _write_json(
            path,
            TOKENIZER_CONFIG,
            _tokenizer_config(tokenizer_json, special, chat_template, config.max_positions),
        )
    _write_json(path, CONFIG, {**described, **ids})


def _tensors_to_write(config: ModelConfig, params: Mapping) -> Iterator[TensorToWrite]:
    flat = flatten(params)
    table = leaves(config)
    missing = [leaf.path for leaf in table if leaf.path not in flat]
    extra = sorted(flat.keys() - {leaf.path for leaf in table})
    wrong = [leaf for leaf in table if leaf.path in flat and flat[leaf.path].shape != leaf.shape]
    problems = [f"missing {'/'.join(path)}" for path in missing]
    problems += [f"unexpected {'/'.join(path)} (merge adapters first)" for path in extra]
    problems += [
        f"{'/'.join(leaf.path)} is {flat[leaf.path].shape}, expected {leaf.shape}" for leaf in wrong
    ]
    if problems:
        raise ModelFileError(f"parameters do not fit the config: {'; '.join(problems[:8])}")
    for leaf in table:
        array = flat[leaf.path]
        for layer, name in enumerate(leaf.names):

            def chunks(leaf: Leaf = leaf, array=array, layer: int = layer) -> Iterator[np.ndarray]:
                return _row_chunks(array[layer] if leaf.stacked else array, leaf.transposed)

            yield TensorToWrite(name, leaf.tensor_shape, np.dtype(array.dtype), chunks)


def _row_chunks(array: jax.Array | np.ndarray, transposed: bool) -> Iterator[np.ndarray]:
    array = np.asarray(array)
    array = array.T if transposed else array
    for start in range(0, len(array), _CHUNK_ROWS):
        yield array[start : start + _CHUNK_ROWS]


def _shards(tensors: list[TensorToWrite], most: int) -> list[list[TensorToWrite]]:
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _tokenizer_config(
    text: str, special: SpecialTokens, chat_template: str | None, max_positions: int
) -> dict:
    tokenizer = parse_tokenizer(TOKENIZER, text)
    named = {
        "bos_token": special.bos_id,
        "eos_token": special.eos_ids[0] if special.eos_ids else None,
        "pad_token": special.pad_id,
    }
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        **{
            name: tokenizer.id_to_token(index) for name, index in named.items() if index is not None
        },
    }
    return fields if chat_template is None else {**fields, "chat_template": chat_template}


def _write_json(path: str, name: str, content: Mapping) -> None:
    write_text(os.path.join(path, name), json.dumps(content, indent=2) + "\n")
