"""What the model_type of a config.json stands for. Source: the configuration and modeling files of the transformers library,
and the published config.json files [O].
"""

import dataclasses
from collections.abc import Callable, Mapping

from sira_jax.models.config import DecoderConfig

# Fields of DecoderConfig that tell families apart.
_TELLING = (
    "activation",
    "norm_plus_one",
    "qk_norm",
    "sandwich_norms",
    "scale_embeddings",
    "query_pre_attn_scalar",
    "attention_softcap",
    "final_softcap",
    "sliding_window",
    "local_rope_theta",
    "qkv_bias",
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
      architecture: class in transformers, which a written config.json names.
      fixed: fields of DecoderConfig that all models of it share, where they differ from the defaults.
      free: fields among those that tell families apart that its config.json can give.
      defaults: what transformers assumes of fields where config.json is silent.
      is_windowed: (layer, defaults and content of config.json) -> whether a layer has the window, where there is a window
        and no layer_types; None: the family has no windows.
      has_layer_types: config.json may list the layers' types.
      needs_flag: the window holds only with use_sliding_window.
      needs_kv_heads: silence on num_key_value_heads is an error; otherwise it means one a query head.
    """

    architecture: str
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    free: frozenset[str] = frozenset()
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    is_windowed: Callable[[int, Mapping[str, object]], bool] | None = None
    has_layer_types: bool = False
    needs_flag: bool = False
    needs_kv_heads: bool = True

    def can_hold(self, config: DecoderConfig) -> bool:
        """Whether a config.json of this family can describe the decoder."""
        expected = _DEFAULTS | dict(self.fixed)
        for field in _TELLING:
            if field not in self.free and getattr(config, field) != expected[field]:
                return False
        # A window that not all layers have must be told by the layers' types.
        windowed = set(config.windowed_layers)
        if len(windowed) > 1 and not self.has_layer_types:
            return False
        # Layers with a base of their own are not scaled, others are all scaled alike.
        has_own_base = "local_rope_theta" in self.free
        is_scaled_window = config.rope_scaling is not None and config.local_rope_theta is None
        return not (has_own_base and is_scaled_window and True in windowed)


_SILENT = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0}
_QWEN = {
    **_SILENT,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_FIXED = {
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "sandwich_norms": True,
    "scale_embeddings": True,
}


def _after_max_window_layers(layer: int, content: Mapping[str, object]) -> bool:
    return layer >= content["max_window_layers"]


# A config is written as the first that can hold it.
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={**_SILENT, "max_position_embeddings": 2048},
        needs_kv_heads=False,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        free=frozenset({"sliding_window"}),
        defaults={**_SILENT, "max_position_embeddings": 131072, "sliding_window": 4096},
        is_windowed=lambda layer, content: True,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        free=frozenset({"sliding_window"}),
        defaults=_QWEN,
        is_windowed=_after_max_window_layers,
        has_layer_types=True,
        needs_flag=True,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        free=frozenset({"sliding_window"}),
        defaults={**_QWEN, "head_dim": 128},
        is_windowed=_after_max_window_layers,
        has_layer_types=True,
        needs_flag=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        fixed=_GEMMA_FIXED,
        free=frozenset(
            {"query_pre_attn_scalar", "attention_softcap", "final_softcap", "sliding_window"}
        ),
        defaults={
            **_GEMMA,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        is_windowed=lambda layer, content: layer % 2 == 0,
        has_layer_types=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        fixed={**_GEMMA_FIXED, "qk_norm": True},
        # No cap on attention logits: transformers reads the field and leaves it at that.
        free=frozenset(
            {"query_pre_attn_scalar", "final_softcap", "sliding_window", "local_rope_theta"}
        ),
        defaults={
            **_GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        is_windowed=lambda layer, content: (layer + 1) % content["sliding_window_pattern"] != 0,
        has_layer_types=True,
    ),
}


def shortest_pattern(windowed: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest beginning that, repeated, gives all layers: of a hundred layers, (True, False) if every other one."""
    for length in range(1, len(windowed) + 1):
        if all(own == windowed[layer % length] for layer, own in enumerate(windowed)):
            return windowed[:length]
    return windowed
