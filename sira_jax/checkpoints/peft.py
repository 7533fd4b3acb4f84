"""LoRA and weight-decomposed DoRA to and from the folders of huggingface/peft: adapter_config.json, adapter_model.safetensors.

Written for what peft 0.17 to 0.21 read and write [O: its saved files, and the forward passes of its LoRA layers]. A PEFT matrix
is (out, in), ours (in, out); PEFT's scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.

Axis letters: D features in, F features out, R rank.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sira_jax.adapters.base import PATHS, AdapterConfig
from sira_jax.adapters.low_rank import LowRankConfig
from sira_jax.adapters.registry import METHODS, make_config
from sira_jax.adapters.trees import by_layer, by_projection
from sira_jax.checkpoints.adapter_file import (
    abstract_adapter,
    check_tensors,
    check_tree,
    fill,
    open_weights,
    read_config_file,
    read_tensor,
    write_folder,
)
from sira_jax.checkpoints.layout import flatten
from sira_jax.checkpoints.safetensors import SafetensorsFile
from sira_jax.errors import CheckpointError, ConfigError, is_finite_number
from sira_jax.models import DecoderConfig, ModelConfig

# Path in a block -> the module's name in a layer of transformers' model.
MODULES = {
    path: ("self_attn." if path.startswith("attention") else "mlp.") + path.split("/")[1] + "_proj"
    for path in PATHS
}
_PREFIX = "base_model.model."
# Fields of adapter_config.json that do not change what a trained adapter computes.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r",
    "rank_pattern", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Other ways to start (pissa, olora, corda, loftq, ...) change the base's own weights.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Part:
    """One adapted projection of one layer as PEFT has it."""

    a_RD: np.ndarray
    b_FR: np.ndarray
    magnitude_F: np.ndarray | None
    alpha: float


def can_export(config: AdapterConfig | type[AdapterConfig]) -> bool:
    """Whether the method computes one low-rank pair a projection, the same for all tokens."""
    return issubclass(config if isinstance(config, type) else type(config), LowRankConfig)


def _check_decoder(model_config: ModelConfig) -> None:
    """Raises CheckpointError for a base whose modules have no names here."""
    if not isinstance(model_config, DecoderConfig):
        raise CheckpointError(
            "adapters of an encoder-decoder are neither written as PEFT adapters nor read from them; `convert.py merge`"
            " writes the merged model"
        )


def save_peft(
    path: str | os.PathLike,
    config: AdapterConfig,
    adapter: Mapping[str, Any],
    model_config: ModelConfig,
    base_params: Mapping[str, Any],
    base_name: str | None = None,
) -> None:
    """Writes an adapter as a PEFT folder.

    Args:
      path: the folder; made if it is not there.
      config: of the adapter: lora, dora, adamix (as it evaluates), or a method that has `as_lora(params) -> (a (D, R),
        b (R, F))`, whose delta is scale * a @ b.
      adapter: its whole tree, layers stacked or apart.
      model_config: of the base.
      base_params: parameters of the base in the layout of `adapter`; only dora reads them, for the columns' norms.
      base_name: written as base_model_name_or_path, where peft looks for the base.

    Raises:
      CheckpointError: the method is no single low-rank pair a projection, or the tree does not fit the config.
    """
    if not can_export(config):
        known = [name for name, method in sorted(METHODS.items()) if can_export(method)]
        raise CheckpointError(
            f"adapter.method={config.method!r} cannot be written as a PEFT adapter: PEFT's LoRA is one low-rank pair a"
            f" projection, the same for all tokens, which this method is not; those that are: {', '.join(known)}"
        )
    _check_decoder(model_config)
    check_tree(config, adapter, model_config)
    parts = _parts(config, adapter, base_params)
    values = {name: (layers[0].a_RD.shape[0], layers[0].alpha) for name, layers in parts.items()}
    # Projections of the commonest rank and alpha need no entry in the patterns.
    ((rank, alpha), _), *_ = Counter(values.values()).most_common()
    short = {name: MODULES[name].split(".")[-1] for name in parts}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": config.dropout_rate,
        "target_modules": sorted(short.values()),
        "rank_pattern": {short[name]: r for name, (r, _) in values.items() if r != rank},
        "alpha_pattern": {short[name]: _plain(a) for name, (_, a) in values.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "use_dora": config.method == "dora",
        "use_rslora": False,
    }
    arrays = {}
    for name, layers in parts.items():
        for layer, part in enumerate(layers):
            arrays |= _tensors(_module(name, layer), part)
    write_folder(path, content, arrays)


def _parts(
    config: AdapterConfig, adapter: Mapping[str, Any], base_params: Mapping[str, Any]
) -> dict[str, list[_Part]]:
    """Projection -> one part a layer."""
    leaves, base = by_projection(adapter), flatten(base_params)
    parts: dict[str, list[_Part]] = {}
    for name, places in by_layer(leaves).items():
        own = config.for_projection(name)
        for path, layer in places:

            def take(x, layer=layer):
                return np.asarray(x if layer is None else x[layer], np.float32)

            params = jax.tree.map(take, leaves[path])
            magnitude_F = None
            a_DR, b_RF = (np.asarray(x, np.float32) for x in own.as_lora(params))
            if config.method == "dora":
                kernel_DF = take(base[*path, "kernel"])
                magnitude_F = column_norms(kernel_DF) + params["magnitude_delta"]
            # PEFT divides by the rank of the whole pair; the digits cut off are those of the division's rounding.
            alpha = float(f"{own.scale * a_DR.shape[-1]:.12g}")
            part = _Part(a_DR.T, b_RF.T, magnitude_F, alpha)
            parts.setdefault(name, []).append(part)
    return parts


def column_norms(kernel_DF: np.ndarray) -> np.ndarray:
    """(F,) float32: Euclidean norm of the weights into each output."""
    return np.linalg.norm(np.asarray(kernel_DF, np.float32), axis=0)


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def _module(name: str, layer: int) -> str:
    return f"model.layers.{layer}.{MODULES[name]}"


def _tensors(module: str, part: _Part) -> dict[str, np.ndarray]:
    tensors = {
        f"{_PREFIX}{module}.lora_A.weight": part.a_RD,
        f"{_PREFIX}{module}.lora_B.weight": part.b_FR,
    }
    if part.magnitude_F is not None:
        tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = part.magnitude_F
    return tensors


def load_peft(
    path: str | os.PathLike, model_config: ModelConfig, base_params: Mapping[str, Any]
) -> tuple[AdapterConfig, dict[str, Any]]:
    """Reads a PEFT folder as our lora or dora.

    Args:
      path: the folder.
      model_config: of the base; its `scan_layers` is the layout of the result.
      base_params: parameters of the base in that layout; only dora reads them, for the columns' norms.

    Returns:
      (config, adapter tree, float32 on the default device). With use_rslora, alpha is lora_alpha * sqrt(r).

    Raises:
      ModelFileError: a file is missing or damaged, or a tensor is missing, unexpected or misshapen.
      CheckpointError: naming the field, if the config describes what lora and dora do not compute.
    """
    _check_decoder(model_config)
    file, content = read_config_file(path)
    _check_fields(file, content)
    with contextlib.closing(open_weights(path)) as source:
        targets = _targets(file, content, source, model_config.num_layers)
        config = _make_config(file, content, targets, model_config.num_layers)
        expected: dict[str, tuple[int, ...]] = {}
        for name in targets:
            d_in, d_out = model_config.projections[name]
            rank = config.for_projection(name).rank
            for layer in range(model_config.num_layers):
                module = _PREFIX + _module(name, layer)
                expected[f"{module}.lora_A.weight"] = (rank, d_in)
                expected[f"{module}.lora_B.weight"] = (d_out, rank)
                if config.method == "dora":
                    expected[f"{module}.lora_magnitude_vector"] = (d_out,)
        check_tensors(source, expected)
        base = flatten(base_params)

        def read(own: str) -> np.ndarray:
            """A tensor by our name, "layers.3.attention.q.lora_a"."""
            _, layer, *block, leaf = own.split(".")
            module = _PREFIX + _module("/".join(block), int(layer))
            if leaf != "magnitude_delta":
                return read_tensor(source, f"{module}.lora_{leaf[-1].upper()}.weight").T
            if model_config.scan_layers:
                kernel_DF = base["layers", *block, "kernel"][int(layer)]
            else:
                kernel_DF = base[f"layers_{layer}", *block, "kernel"]
            magnitude_F = read_tensor(source, f"{module}.lora_magnitude_vector")
            return magnitude_F.astype(np.float32) - column_norms(kernel_DF)

        return config, fill(abstract_adapter(config, model_config), read)


def _refuse(file: str, field: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"{file}: {field}={value!r} is not supported: {allowed}")


def _check_fields(file: str, content: Mapping[str, Any]) -> None:
    """Raises CheckpointError for fields that change what the adapter computes, known to us or not."""
    for field, allowed in (
        ("peft_type", ("LORA",)),
        ("task_type", ("CAUSAL_LM", None)),
        ("bias", ("none", None)),
        ("init_lora_weights", _STARTS),
    ):
        value = content.get(field)
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            raise _refuse(file, field, value, f"one of {', '.join(map(str, allowed))}")
    for field in ("use_dora", "use_rslora"):
        if content.get(field) not in (None, True, False):
            raise _refuse(file, field, content[field], "true or false")
    for field, value in content.items():
        if field not in _READ | _IGNORED and value not in (None, False, [], {}, ""):
            raise _refuse(file, field, value, "only null, false or empty")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not _is_rank(rank):
        raise _refuse(file, "r", rank, "a whole number over 0")
    if not _is_alpha(alpha):
        raise _refuse(file, "lora_alpha", alpha, "a number over 0")
    for field, is_value in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = content.get(field) or {}
        if not isinstance(patterns, Mapping) or not all(map(is_value, patterns.values())):
            raise _refuse(file, field, patterns, "an object of names of modules and numbers over 0")
        for pattern in patterns:
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise _refuse(
                    file, field, pattern, "names of modules; regular expressions are not read"
                )


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: object) -> bool:
    return is_finite_number(value) and value > 0


def _targets(
    file: str, content: Mapping[str, Any], source: SafetensorsFile, num_layers: int
) -> list[str]:
    """The adapted projections' paths: those of target_modules, or, where it is one expression, of the tensors there."""
    modules = content.get("target_modules")
    allowed = f"names out of {', '.join(name.split('.')[1] for name in MODULES.values())}"
    if isinstance(modules, str):
        return [name for name in PATHS if _tensor_exists(source, MODULES[name])]
    is_list = isinstance(modules, list) and all(isinstance(module, str) for module in modules)
    if not is_list or not modules:
        raise _refuse(file, "target_modules", modules, allowed)
    known = [_module(name, layer) for name in PATHS for layer in range(num_layers)]
    for module in modules:
        if not any(_is_named(one, module) for one in known):
            raise _refuse(file, "target_modules", module, allowed)
    found = []
    for name in PATHS:
        layers = [
            any(_is_named(_module(name, layer), module) for module in modules)
            for layer in range(num_layers)
        ]
        if any(layers) and not all(layers):
            raise _refuse(
                file,
                "target_modules",
                modules,
                f"all {num_layers} layers of {MODULES[name]}, or none",
            )
        found += [name] if all(layers) else []
    return found


def _tensor_exists(source: SafetensorsFile, module: str) -> bool:
    ends = (f".{module}.lora_A.weight", f".{module}.lora_B.weight")
    return any(name.endswith(ends) for name in source.shapes)


def _is_named(module: str, name: str) -> bool:
    """Whether PEFT takes `name` for the module: the whole of its name or, after a dot, the end of it."""
    return module == name or module.endswith(f".{name}")


def _make_config(
    file: str, content: Mapping[str, Any], targets: list[str], num_layers: int
) -> AdapterConfig:
    overrides = []
    default = _scaled(content, content["r"], content["lora_alpha"])
    for name in targets:
        values = set()
        for layer in range(num_layers):
            module = _module(name, layer)
            rank = _pattern_value(content, "rank_pattern", module, content["r"])
            alpha = _pattern_value(content, "alpha_pattern", module, content["lora_alpha"])
            values.add(_scaled(content, rank, alpha))
        if len(values) > 1:
            raise CheckpointError(
                f"{file}: rank_pattern and alpha_pattern give {MODULES[name]} other values in other layers, which is"
                " not supported: one rank and one alpha a projection, in all layers"
            )
        (own,) = values
        if own != default:
            overrides.append((name.split("/")[1], dict(zip(("rank", "alpha"), own, strict=True))))
    fields = {
        "method": "dora" if content.get("use_dora") else "lora",
        "rank": default[0],
        "alpha": default[1],
        "dropout_rate": content.get("lora_dropout", 0.0),
        "targets": [name.split("/")[1] for name in targets],
        "overrides": overrides,
    }
    try:
        return make_config(fields)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _scaled(content: Mapping[str, Any], rank: int, alpha: float) -> tuple[int, float]:
    """(rank, alpha) whose ratio is PEFT's scale."""
    return rank, alpha * math.sqrt(rank) if content.get("use_rslora") else alpha


def _pattern_value(content: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The first pattern's value that fits the module, as PEFT reads them; a leading ^ asks for the whole name."""
    for pattern, value in (content.get(field) or {}).items():
        whole = pattern.startswith("^") and pattern[1:] == module
        if whole or _is_named(module, pattern):
            return value
    return default
