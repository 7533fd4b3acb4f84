"""The decoder that a GGUF header describes. Source: llama.cpp's conversion script and its loading of hyperparameters [O]."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from sira_jax.checkpoints.gguf_header import GGUFHeader
from sira_jax.checkpoints.hf_config import make_config
from sira_jax.checkpoints.hf_families import FAMILIES, shortest_pattern
from sira_jax.errors import ModelFileError
from sira_jax.models.config import DecoderConfig
from sira_jax.models.rope import LinearRopeScaling, RopeScaling

ROPE_FACTORS = "rope_freqs.weight"
_MOST_LAYERS = 1000  # from one global layer to the next
_BLOCK_NAMES: Mapping[str, str] = {
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
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    **_BLOCK_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A value of general.architecture.

    Attributes:
      block_names: part of a tensor's name after "blk.N." -> part after "model.layers.N." in a Hugging Face checkpoint.
      fixed: fields of DecoderConfig that all files of it share, where they differ from the defaults.
      is_permuted: the rows of q and k are stored for rotary positions on interleaved pairs.
      has_norms_plus_one: the 1 that the norms of this family add is in the stored weights.
      windows_of: layers from one global layer to the next; None: no layer has a window.
      window: where the file names none.
      windowed_theta: base of the rotary frequencies of windowed layers, which no published file names; None: as of all.
      has_caps: attention and final logits may be capped, by 50 and 30 where the file is silent.
      scaled_by_width: numbers of layers of the sizes whose attention is scaled by emb_dim / num_heads, not by head_dim,
        which no field says.
    """

    block_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _BLOCK_NAMES)
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    is_permuted: bool = False
    has_norms_plus_one: bool = False
    windows_of: int | None = None
    window: int | None = None
    windowed_theta: float | None = None
    has_caps: bool = False
    scaled_by_width: frozenset[int] = frozenset()


ARCHITECTURES = {
    "llama": Architecture(is_permuted=True),
    "qwen2": Architecture(fixed=FAMILIES["qwen2"].fixed),
    "qwen3": Architecture(fixed=FAMILIES["qwen3"].fixed, block_names=_BLOCK_NAMES | _QK_NORMS),
    "gemma2": Architecture(
        fixed=FAMILIES["gemma2"].fixed,
        block_names=_SANDWICH,
        has_norms_plus_one=True,
        windows_of=2,
        window=4096,
        has_caps=True,
        scaled_by_width=frozenset({46}),
    ),
    "gemma3": Architecture(
        fixed=FAMILIES["gemma3_text"].fixed,
        block_names=_SANDWICH | _QK_NORMS,
        has_norms_plus_one=True,
        windows_of=6,
        windowed_theta=10000.0,
        scaled_by_width=frozenset({62}),
    ),
}


class _Metadata:
    """Typed access to the fields of an architecture."""

    def __init__(self, path: str, metadata: Mapping[str, object]):
        self.path = path
        self.metadata = metadata
        self.arch = metadata.get("general.architecture")

    def get(self, key: str, default: object = None) -> object:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise ModelFileError(f"{self.path}: field {self.arch}.{key} is missing")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one value a layer, all equal
        if isinstance(value, list | str | bool):
            raise ModelFileError(f"{self.path}: {self.arch}.{key}={value!r} must be one number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        # The file holds float32; its shortest decimal form is the number that was meant (1e-5).
        with np.errstate(
            over="ignore"
        ):  # of a float64: what float32 cannot hold is refused as infinite
            value = float(str(np.float32(self.get(key, default))))
        if not math.isfinite(value) or value <= 0:
            raise ModelFileError(
                f"{self.path}: {self.arch}.{key}={value!r} must be a number over 0"
            )
        return value

    def refuse(self, key: str, value: object, allowed: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: {self.arch}.{key}={value!r} is not supported: {allowed}"
        )


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
    fields = _Metadata(path, header.metadata)
    kind = ARCHITECTURES.get(fields.arch) if isinstance(fields.arch, str) else None
    if kind is None:
        raise ModelFileError(
            f"{path}: general.architecture={fields.arch!r} is not supported: one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if fields.get("expert_count", 0) != 0:
        raise fields.refuse("expert_count", fields.get("expert_count"), "0, a dense model")
    num_heads, emb_dim = fields.get("attention.head_count"), fields.get("embedding_length")
    if num_heads < 1:
        raise ModelFileError(
            f"{path}: {fields.arch}.attention.head_count={num_heads!r} must be over 0"
        )
    head_dim = fields.get("attention.key_length", emb_dim // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.get(key, head_dim) != head_dim:
            raise fields.refuse(key, fields.get(key), f"the head's width {head_dim}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{path}: missing tensors: token_embd.weight")
    theta, num_layers = fields.number("rope.freq_base", 10000.0), fields.get("block_count")
    scaled_by_width = num_layers in kind.scaled_by_width
    return make_config(
        path,
        vocab_size=embedding.shape[0],
        emb_dim=emb_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_dim=fields.get("feed_forward_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        query_pre_attn_scalar=emb_dim / num_heads if scaled_by_width else None,
        rope_theta=theta,
        rope_scaling=_rope_scaling(fields, rope_factors, theta, head_dim),
        tie_embeddings="output.weight" not in header.tensors,
        max_positions=fields.get("context_length"),
        **kind.fixed,
        **_window(fields, kind),
        **_caps(fields, kind),
        **options,
    )


def _window(fields: _Metadata, kind: Architecture) -> dict[str, object]:
    key = "attention.sliding_window"
    window = fields.get(key, kind.window or 0)
    if window == 0:
        return {}
    if kind.windows_of is None:
        raise fields.refuse(key, window, "0, full attention")
    key = "attention.sliding_window_pattern"
    period = fields.metadata.get(f"{fields.arch}.{key}", kind.windows_of)
    if isinstance(period, list) and period and all(type(own) is bool for own in period):
        pattern = shortest_pattern(tuple(period))
    elif type(period) is int and 0 < period < _MOST_LAYERS:
        pattern = (True,) * (period - 1) + (False,)
    else:
        raise fields.refuse(key, period, "a whole number over 0, or a list of true and false")
    if True not in pattern:
        return {}
    found = {"sliding_window": window, "window_pattern": pattern}
    if kind.windowed_theta is not None:
        found["local_rope_theta"] = fields.number("rope.freq_base_swa", kind.windowed_theta)
    return found


def _caps(fields: _Metadata, kind: Architecture) -> dict[str, object]:
    if kind.has_caps:
        return {
            "attention_softcap": fields.number("attn_logit_softcapping", 50.0),
            "final_softcap": fields.number("final_logit_softcapping", 30.0),
        }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.get(key, 0) != 0:
            raise fields.refuse(key, fields.get(key), "0, logits without a cap")
    return {}


def _rope_scaling(
    fields: _Metadata, factors: np.ndarray | None, theta: float, head_dim: int
) -> RopeScaling | LinearRopeScaling | None:
    """Returns the linear scaling of the metadata, or the Llama-3 scaling whose divisors the file holds as a tensor."""
    kind = fields.metadata.get(f"{fields.arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.refuse("rope.scaling.type", kind, "none or linear")
    factor = fields.number("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    is_scaled = factors is not None and not np.all(factors == 1)
    if factor != 1:
        if is_scaled:
            raise fields.refuse(
                "rope.scaling.factor", factor, f"1 beside the tensor {ROPE_FACTORS}"
            )
        if factor < 1:
            raise fields.refuse("rope.scaling.factor", factor, "at least 1")
        return LinearRopeScaling(factor=factor)
    if not is_scaled:
        return None
    # The published Llama 3.1 to 3.3 configs all have low 1, high 4 and 8192 positions.
    original = int(fields.number("rope.scaling.original_context_length", 8192))
    factor = float(factors.max()) if factors.size else math.nan
    if not math.isfinite(factor):
        raise ModelFileError(f"{fields.path}: tensor {ROPE_FACTORS} must hold numbers over 0")
    scaling = RopeScaling(factor=max(1.0, factor), original_max_positions=max(1, original))
    if factors.shape != (head_dim // 2,) or not np.allclose(
        factors, rope_divisors(scaling, theta, head_dim), rtol=1e-3
    ):
        raise ModelFileError(
            f"{fields.path}: tensor {ROPE_FACTORS} is not supported: it is not Llama 3's scaling "
            f"with factor {scaling.factor}, low_freq_factor 1, high_freq_factor 4, {original} positions"
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
