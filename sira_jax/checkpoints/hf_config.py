"""Hugging Face config.json to DecoderConfig and back. Field meanings: the transformers library [O]; what a model_type fixes
and assumes is in hf_families.py.
"""

import os
from collections.abc import Mapping

from sira_jax.checkpoints.hf_families import FAMILIES, Family, shortest_pattern
from sira_jax.checkpoints.safetensors import read_json
from sira_jax.errors import ConfigError, ModelFileError, is_finite_number
from sira_jax.models.config import DecoderConfig
from sira_jax.models.rope import LinearRopeScaling, RopeScaling

CONFIG = "config.json"
# A model_type that has a language model beside others, and the model_type of that, whose fields are in text_config.
_WITH_TEXT_PART = {"gemma3": "gemma3_text"}
MODEL_TYPES = (*FAMILIES, *_WITH_TEXT_PART)
_ACTIVATIONS = {
    "silu": ("hidden_act", ("silu", "swish")),
    "gelu_tanh": ("hidden_activation", ("gelu_pytorch_tanh",)),
}
_CAPS = (
    ("attention_softcap", "attn_logit_softcapping"),
    ("final_softcap", "final_logit_softcapping"),
)
_WINDOWED, _GLOBAL = "sliding_attention", "full_attention"
_MOST_LAYERS = 1000  # of a model with windows: absurd counts are not to be listed


class Fields:
    """Typed access to the fields of one JSON object; every error names the file and the field.

    Where the object is silent or has null, the value is that of `defaults`, if there is one.
    """

    def __init__(
        self, path: str, content: Mapping, defaults: Mapping | None = None, prefix: str = ""
    ):
        self.path = path
        self.content = content
        self.defaults = defaults or {}
        self.prefix = prefix

    def get(self, field: str) -> object:
        value = self.content.get(field)
        return self.defaults.get(field) if value is None else value

    def nullable(self, field: str) -> object:
        """The value where null is one, and no default for it."""
        return self.content[field] if field in self.content else self.defaults.get(field)

    def fail(self, field: str, allowed: str) -> ModelFileError:
        value = self.get(field)
        return ModelFileError(
            f"{self.path}: {self.prefix}{field}={value!r} is not supported: {allowed}"
        )

    def count(self, field: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(field)
        value = default if value is None else value
        if value is None:
            raise ModelFileError(f"{self.path}: field {self.prefix}{field} is missing")
        if type(value) is not int or not least <= value < 2**31:
            raise self.fail(field, f"a whole number over {least - 1}, under 2**31")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.get(field)
        value = default if value is None else value
        if value is None:
            raise ModelFileError(f"{self.path}: field {self.prefix}{field} is missing")
        if not is_finite_number(value) or value <= 0:
            raise self.fail(field, "a number over 0")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.get(field)
        if value not in (None, True, False):
            raise self.fail(field, "true or false")
        return bool(value)


def read_decoder_config(path: str, **options: object) -> DecoderConfig:
    """Returns the DecoderConfig that a folder's config.json describes.

    Args:
      path: the folder.
      **options: fields of DecoderConfig that a checkpoint does not give: dtype, param_dtype,
        scan_layers, remat_policy.

    Raises:
      ModelFileError: naming the field and what is supported, if the decoder cannot compute what the
        file describes.
    """
    file = os.path.join(path, CONFIG)
    content, prefix = read_json(file), ""
    model_type = content.get("model_type")
    if content.get("quantization_config") is not None:
        raise ModelFileError(
            f"{file}: quantization_config is not supported: load the full model or a GGUF file"
        )
    if isinstance(model_type, str) and model_type in _WITH_TEXT_PART:
        model_type, content, prefix = (
            _WITH_TEXT_PART[model_type],
            content.get("text_config"),
            "text_config.",
        )
        if not isinstance(content, dict):
            raise ModelFileError(f"{file}: text_config={content!r} is not supported: an object")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise Fields(file, content).fail("model_type", f"one of {', '.join(MODEL_TYPES)}")
    fields = Fields(file, content, family.defaults, prefix)
    _check_activation(fields, family)
    for field in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if fields.flag(field) and not (field == "attention_bias" and "qkv_bias" in family.fixed):
            raise fields.fail(field, "false, this decoder has no such biases and looks back only")
    num_heads = fields.count("num_attention_heads")
    emb_dim = fields.count("hidden_size")
    if fields.get("head_dim") is None and emb_dim % num_heads:
        raise fields.fail(
            "hidden_size", f"a multiple of num_attention_heads={num_heads}, or give head_dim"
        )
    head_dim = fields.count("head_dim", emb_dim // num_heads or None)
    max_positions = fields.count("max_position_embeddings")
    # Null means one key and value head a query head everywhere; silence means so only for llama.
    is_null = "num_key_value_heads" in content and content["num_key_value_heads"] is None
    kv_heads = num_heads if is_null or not family.needs_kv_heads else None
    num_layers = fields.count("num_hidden_layers")
    window = _read_window(fields, family, num_layers, max_positions)
    return make_config(
        file,
        vocab_size=fields.count("vocab_size"),
        emb_dim=emb_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads if is_null else fields.count("num_key_value_heads", kv_heads),
        head_dim=head_dim,
        mlp_dim=fields.count("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        max_positions=max_positions,
        **family.fixed,
        **window,
        **_read_rope(fields, family, max_positions, has_window=bool(window)),
        **_read_attention_scalars(fields, family, head_dim),
        **options,
    )


def make_config(path: str, **fields: object) -> DecoderConfig:
    """Returns DecoderConfig(**fields); what that refuses becomes a ModelFileError that names
    `path`.
    """
    try:
        return DecoderConfig(**fields)
    except ConfigError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _check_activation(fields: Fields, family: Family) -> None:
    field, names = _ACTIVATIONS[family.fixed.get("activation", "silu")]
    if fields.get(field) not in names:
        raise fields.fail(field, names[0])


def _read_attention_scalars(fields: Fields, family: Family, head_dim: int) -> dict[str, object]:
    """The softcaps and the scale of attention, of the families that have them."""
    found: dict[str, object] = {}
    for name, field in _CAPS:
        if fields.nullable(field) is None:
            continue
        if name not in family.free:
            raise fields.fail(field, "null")
        found[name] = fields.number(field)
    if "query_pre_attn_scalar" in family.free:
        scalar = fields.number("query_pre_attn_scalar")
        found["query_pre_attn_scalar"] = None if scalar == head_dim else scalar
    return found


def _read_window(
    fields: Fields, family: Family, num_layers: int, max_positions: int
) -> dict[str, object]:
    """sliding_window and window_pattern; nothing where no layer is windowed."""
    types = fields.get("layer_types")
    is_list = isinstance(types, list) and set(map(str, types)) <= {_WINDOWED, _GLOBAL}
    if types is not None and (not is_list or len(types) != num_layers):
        raise fields.fail(
            "layer_types",
            f"a list of {_GLOBAL} and {_WINDOWED}, one for each of {num_layers} layers",
        )
    window = fields.nullable("sliding_window")
    has_window = family.is_windowed is not None and window is not None
    if not has_window or (family.needs_flag and not fields.flag("use_sliding_window")):
        if types is not None and _WINDOWED in types and not family.needs_flag:
            raise fields.fail("layer_types", f"{_GLOBAL} alone, sliding_window being {window!r}")
        return {}
    window = fields.count("sliding_window")
    if num_layers > _MOST_LAYERS:
        raise fields.fail("num_hidden_layers", f"at most {_MOST_LAYERS}")
    counts = {
        name: fields.count(name, least=least)
        for name, least in (("max_window_layers", 0), ("sliding_window_pattern", 1))
        if name in family.defaults
    }
    windowed = tuple(family.is_windowed(layer, counts) for layer in range(num_layers))
    if types is not None:
        listed = tuple(name == _WINDOWED for name in types)
        if not family.has_layer_types and listed != windowed:
            raise fields.fail("layer_types", f"null, or {_WINDOWED} alone")
        windowed = listed
    # A window over all positions hides nothing; where windowed layers rotate otherwise, they still differ.
    hides_nothing = window >= max_positions and "local_rope_theta" not in family.free
    if True not in windowed or hides_nothing:
        return {}
    return {"sliding_window": window, "window_pattern": shortest_pattern(windowed)}


def _read_rope(
    fields: Fields, family: Family, max_positions: int, has_window: bool
) -> dict[str, object]:
    """rope_theta, rope_scaling and, of the families that have one, local_rope_theta."""
    has_local = "local_rope_theta" in family.free
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    content = fields.get(name) or {}
    local: object = {}
    if has_local and isinstance(content, dict) and {_WINDOWED, _GLOBAL} & set(content):
        # rope_parameters (transformers 5) by the layers' types.
        content, local = (content.get(kind) or {} for kind in (_GLOBAL, _WINDOWED))
    objects = [x for x in (content, local) if isinstance(x, dict)]
    if len(objects) < 2 or any(isinstance(value, dict) for x in objects for value in x.values()):
        raise fields.fail(name, "null or one object with rope_type for all layers")
    rope = Fields(fields.path, content, prefix=f"{fields.prefix}{name}.")
    local_rope = Fields(fields.path, local, prefix=f"{fields.prefix}{name}.{_WINDOWED}.")
    for source in (fields, rope, local_rope):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.fail("partial_rotary_factor", "1, rotary positions on the whole head")
    # rope_parameters holds the base as well; before, it was a field of its own.
    theta = rope.number("rope_theta", fields.number("rope_theta"))
    found = {"rope_theta": theta, "rope_scaling": _read_scaling(rope, max_positions)}
    if has_local and has_window:
        if _read_scaling(local_rope, max_positions) is not None:
            raise local_rope.fail("rope_type", "default")
        base = fields.number("rope_local_base_freq")
        found["local_rope_theta"] = local_rope.number("rope_theta", base)
    return found


def _read_scaling(rope: Fields, max_positions: int) -> RopeScaling | LinearRopeScaling | None:
    rope_type = rope.content.get("rope_type", rope.content.get("type", "default"))
    try:
        if rope_type == "default":
            return None
        if rope_type == "linear":
            return LinearRopeScaling(factor=rope.number("factor"))
        if rope_type == "llama3":
            original = rope.count("original_max_position_embeddings", max_positions)
            return RopeScaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=original,
            )
    except ConfigError as error:
        raise ModelFileError(f"{rope.path}: {error}") from None
    raise ModelFileError(
        f"{rope.path}: {rope.prefix}rope_type={rope_type!r} is not supported: default, linear or llama3"
    )


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns the fields of a config.json, of the first family that can hold them all.

    Raises:
      ModelFileError: no family can.
    """
    model_type = next((name for name, family in FAMILIES.items() if family.can_hold(config)), None)
    if model_type is None:
        raise ModelFileError(
            f"no model_type of config.json describes this decoder: none of {', '.join(FAMILIES)} "
            f"has just these fields: {config}"
        )
    family = FAMILIES[model_type]
    activation, names = _ACTIVATIONS[config.activation]
    fields: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        activation: names[0],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _write_scaling(config.rope_scaling)
    if not config.qkv_bias:
        fields["attention_bias"] = False
    if not family.free:
        fields["mlp_bias"] = False
    return fields | _write_window(config, family) | _write_scalars(config, family)


def _write_scaling(scaling: RopeScaling | LinearRopeScaling) -> dict[str, object]:
    if isinstance(scaling, LinearRopeScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _write_window(config: DecoderConfig, family: Family) -> dict[str, object]:
    if family.is_windowed is None:
        return {}
    windowed = config.windowed_layers
    fields: dict[str, object] = {"sliding_window": config.sliding_window}
    if family.needs_flag:
        fields["use_sliding_window"] = config.sliding_window is not None
    if family.has_layer_types and (True in windowed or not family.needs_flag):
        fields["layer_types"] = [_WINDOWED if own else _GLOBAL for own in windowed]
    return fields


def _write_scalars(config: DecoderConfig, family: Family) -> dict[str, object]:
    """What the families that have them say of attention's scale, of caps and of the windowed layers' base."""
    fields: dict[str, object] = {}
    for name, field in _CAPS:
        if name in family.free:
            fields[field] = getattr(config, name)
    if "query_pre_attn_scalar" in family.free:
        scalar = config.query_pre_attn_scalar or config.head_dim
        # transformers 5 takes a whole number alone.
        fields["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    if "local_rope_theta" in family.free:
        fields["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    return fields
