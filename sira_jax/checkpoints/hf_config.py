"""Hugging Face config.json to DecoderConfig and back. Field meanings and defaults: the transformers
library [O].
"""

import dataclasses
import math
import os

from sira_jax.checkpoints.safetensors import read_json
from sira_jax.errors import ConfigError, ModelFileError
from sira_jax.models.config import DecoderConfig, RopeScaling

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class _Family:
    """What transformers assumes of a model_type where config.json is silent."""

    max_positions: int
    kv_heads_default_to_heads: bool = False
    sliding_window: int | None = None
    qkv_bias: bool = False


FAMILIES = {
    "llama": _Family(max_positions=2048, kv_heads_default_to_heads=True),
    "mistral": _Family(max_positions=131072, sliding_window=4096),
    "qwen2": _Family(max_positions=32768, sliding_window=4096, qkv_bias=True),
}


class Fields:
    """Typed access to the fields of one JSON object; every error names the file and the field."""

    def __init__(self, path: str, content: dict):
        self.path = path
        self.content = content

    def fail(self, field: str, allowed: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: {field}={self.content.get(field)!r} is not supported: {allowed}"
        )

    def count(self, field: str, default: int | None = None) -> int:
        value = self.content.get(field)
        value = default if value is None else value
        if value is None:
            raise ModelFileError(f"{self.path}: field {field} is missing")
        if type(value) is not int or value < 1:
            raise self.fail(field, "a whole number over 0")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.content.get(field)
        value = default if value is None else value
        if value is None:
            raise ModelFileError(f"{self.path}: field {field} is missing")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.fail(field, "a number over 0")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.content.get(field)
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
    fields = Fields(file, read_json(file))
    model_type = fields.content.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise fields.fail("model_type", f"one of {', '.join(FAMILIES)}")
    if fields.content.get("quantization_config") is not None:
        raise ModelFileError(
            f"{file}: quantization_config is not supported: load the full model or a GGUF file"
        )
    if fields.content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fail("hidden_act", "silu")
    for field in ("attention_bias", "mlp_bias"):
        if fields.flag(field) and model_type != "qwen2":
            raise fields.fail(field, "false, this decoder has no such biases")
    num_heads = fields.count("num_attention_heads")
    emb_dim = fields.count("hidden_size")
    head_dim = fields.count("head_dim", emb_dim // num_heads or None)
    if fields.content.get("head_dim") is None and emb_dim % num_heads:
        raise fields.fail(
            "hidden_size", f"a multiple of num_attention_heads={num_heads}, or give head_dim"
        )
    max_positions = fields.count("max_position_embeddings", family.max_positions)
    _check_sliding_window(fields, family, max_positions)
    rope_theta, rope_scaling = _read_rope(fields, max_positions)
    # Null means one key and value head a query head everywhere; silence means so only for llama.
    is_null = "num_key_value_heads" in fields.content
    kv_default = num_heads if is_null or family.kv_heads_default_to_heads else None
    return make_config(
        file,
        vocab_size=fields.count("vocab_size"),
        emb_dim=emb_dim,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", kv_default),
        head_dim=head_dim,
        mlp_dim=fields.count("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        max_positions=max_positions,
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


def _check_sliding_window(fields: Fields, family: _Family, max_positions: int) -> None:
    if family.sliding_window is None:
        return
    # transformers looks at Qwen2's window only when use_sliding_window is set, at Mistral's always.
    if family is FAMILIES["qwen2"] and not fields.flag("use_sliding_window"):
        return
    window = fields.content.get("sliding_window", family.sliding_window)
    if window is not None and (type(window) is not int or window < max_positions):
        raise ModelFileError(
            f"{fields.path}: sliding_window={window!r} is not supported: null, or at least "
            f"max_position_embeddings={max_positions}; every layer here attends to all positions"
        )


def _read_rope(fields: Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    name = "rope_scaling" if fields.content.get("rope_scaling") else "rope_parameters"
    content = fields.content.get(name) or {}
    if not isinstance(content, dict) or any(isinstance(v, dict) for v in content.values()):
        raise fields.fail(name, "null or one object with rope_type for all layers")
    rope = Fields(fields.path, content)
    # rope_parameters (transformers 5) holds the base as well; before, it was a field of its own.
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    for source in (fields, rope):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.fail("partial_rotary_factor", "1, rotary positions on the whole head")
    rope_type = content.get("rope_type", content.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise ModelFileError(
            f"{fields.path}: {name}.rope_type={rope_type!r} is not supported: default or llama3"
        )
    try:
        return theta, RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_positions=rope.count("original_max_position_embeddings", max_positions),
        )
    except ConfigError as error:
        raise ModelFileError(f"{fields.path}: {error}") from None


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns the fields of a config.json: of qwen2 if q, k and v have biases, else of llama."""
    fields: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    if config.qkv_bias:
        fields |= {"use_sliding_window": False, "sliding_window": None}
    else:
        fields |= {"attention_bias": False, "mlp_bias": False}
    return fields
