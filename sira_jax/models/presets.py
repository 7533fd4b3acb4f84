"""Published sizes by name, for models that are made from scratch or before their weights are there.

A folder or file with weights carries its own config: `checkpoints.read_config` reads that. Source:
each model's config.json as published (base model where base and instruct differ) [O].
"""

import dataclasses
from types import MappingProxyType

from sira_jax.errors import ConfigError
from sira_jax.models.config import DecoderConfig
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig
from sira_jax.models.factory import ModelConfig
from sira_jax.models.rope import LinearRopeScaling, RopeScaling
from sira_jax.models.t5_presets import T5_PRESETS, count_t5_parameters


def _smollm2(**sizes: int | float) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=49152,
        head_dim=64,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=8192,
        **sizes,
    )


def _llama3(*, scaling_factor: float | None, tie_embeddings: bool = False, **sizes: int):
    scaling = None
    if scaling_factor is not None:
        scaling = RopeScaling(
            factor=scaling_factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        )
    return DecoderConfig(
        vocab_size=128256,
        num_kv_heads=8,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tie_embeddings=tie_embeddings,
        max_positions=8192 if scaling is None else 131072,
        **sizes,
    )


def _qwen2_5(*, tie_embeddings: bool, norm_eps: float = 1e-6, **sizes: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151936 if tie_embeddings else 152064,
        norm_eps=norm_eps,
        rope_theta=1000000.0,
        tie_embeddings=tie_embeddings,
        qkv_bias=True,
        **sizes,
    )


def _qwen3(*, tie_embeddings: bool, max_positions: int = 32768, **sizes: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151936,
        num_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_embeddings=tie_embeddings,
        max_positions=max_positions,
        **sizes,
    )


_GEMMA = {
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "norm_plus_one": True,
    "sandwich_norms": True,
    "scale_embeddings": True,
    "tie_embeddings": True,
}


def _gemma2(*, head_dim: int = 256, **sizes: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=256000,
        head_dim=head_dim,
        attention_softcap=50.0,
        final_softcap=30.0,
        sliding_window=4096,
        window_pattern=(True, False),
        max_positions=8192,
        **_GEMMA,
        **sizes,
    )


def _gemma3(*, reads_images: bool, window: int, head_dim: int = 256, **sizes: int):
    """The text part: with the sizes that read images come more ids, four times the positions and a scaling."""
    return DecoderConfig(
        vocab_size=262208 if reads_images else 262144,
        head_dim=head_dim,
        qk_norm=True,
        sliding_window=window,
        window_pattern=(True,) * 5 + (False,),
        rope_theta=1000000.0,
        rope_scaling=LinearRopeScaling(factor=8.0) if reads_images else None,
        local_rope_theta=10000.0,
        max_positions=131072 if reads_images else 32768,
        **_GEMMA,
        **sizes,
    )


_LLAMA_8B = {"emb_dim": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128, "mlp_dim": 14336}
_LLAMA_70B = {"emb_dim": 8192, "num_layers": 80, "num_heads": 64, "head_dim": 128, "mlp_dim": 28672}

PRESETS = MappingProxyType(
    {
        "tiny": DecoderConfig(
            vocab_size=256,
            emb_dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=128,
            max_positions=256,
        ),
        "smollm2-135m": _smollm2(
            emb_dim=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            mlp_dim=1536,
            rope_theta=100000.0,
        ),
        "smollm2-360m": _smollm2(
            emb_dim=960,
            num_layers=32,
            num_heads=15,
            num_kv_heads=5,
            mlp_dim=2560,
            rope_theta=100000.0,
        ),
        "smollm2-1.7b": _smollm2(
            emb_dim=2048,
            num_layers=24,
            num_heads=32,
            num_kv_heads=32,
            mlp_dim=8192,
            rope_theta=130000.0,
        ),
        "llama-3-8b": _llama3(scaling_factor=None, **_LLAMA_8B),
        "llama-3-70b": _llama3(scaling_factor=None, **_LLAMA_70B),
        "llama-3.1-8b": _llama3(scaling_factor=8.0, **_LLAMA_8B),
        "llama-3.1-70b": _llama3(scaling_factor=8.0, **_LLAMA_70B),
        "llama-3.1-405b": _llama3(
            scaling_factor=8.0,
            emb_dim=16384,
            num_layers=126,
            num_heads=128,
            head_dim=128,
            mlp_dim=53248,
        ),
        "llama-3.2-1b": _llama3(
            scaling_factor=32.0,
            tie_embeddings=True,
            emb_dim=2048,
            num_layers=16,
            num_heads=32,
            head_dim=64,
            mlp_dim=8192,
        ),
        "llama-3.2-3b": _llama3(
            scaling_factor=32.0,
            tie_embeddings=True,
            emb_dim=3072,
            num_layers=28,
            num_heads=24,
            head_dim=128,
            mlp_dim=8192,
        ),
        "llama-3.3-70b": _llama3(scaling_factor=8.0, **_LLAMA_70B),
        "qwen2.5-0.5b": _qwen2_5(
            tie_embeddings=True,
            emb_dim=896,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=4864,
            max_positions=32768,
        ),
        "qwen2.5-1.5b": _qwen2_5(
            tie_embeddings=True,
            emb_dim=1536,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            head_dim=128,
            mlp_dim=8960,
            max_positions=131072,
        ),
        "qwen2.5-3b": _qwen2_5(
            tie_embeddings=True,
            emb_dim=2048,
            num_layers=36,
            num_heads=16,
            num_kv_heads=2,
            head_dim=128,
            mlp_dim=11008,
            max_positions=32768,
        ),
        "qwen2.5-7b": _qwen2_5(
            tie_embeddings=False,
            emb_dim=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            mlp_dim=18944,
            max_positions=131072,
        ),
        # The three largest base models have 1e-5, their instruct versions 1e-6.
        "qwen2.5-14b": _qwen2_5(
            tie_embeddings=False,
            norm_eps=1e-5,
            emb_dim=5120,
            num_layers=48,
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=13824,
            max_positions=131072,
        ),
        "qwen2.5-32b": _qwen2_5(
            tie_embeddings=False,
            norm_eps=1e-5,
            emb_dim=5120,
            num_layers=64,
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=27648,
            max_positions=131072,
        ),
        "qwen2.5-72b": _qwen2_5(
            tie_embeddings=False,
            norm_eps=1e-5,
            emb_dim=8192,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=29568,
            max_positions=131072,
        ),
        "qwen3-0.6b": _qwen3(
            tie_embeddings=True, emb_dim=1024, num_layers=28, num_heads=16, mlp_dim=3072
        ),
        "qwen3-1.7b": _qwen3(
            tie_embeddings=True, emb_dim=2048, num_layers=28, num_heads=16, mlp_dim=6144
        ),
        "qwen3-4b": _qwen3(
            tie_embeddings=True, emb_dim=2560, num_layers=36, num_heads=32, mlp_dim=9728
        ),
        "qwen3-8b": _qwen3(
            tie_embeddings=False, emb_dim=4096, num_layers=36, num_heads=32, mlp_dim=12288
        ),
        "qwen3-14b": _qwen3(
            tie_embeddings=False, emb_dim=5120, num_layers=40, num_heads=40, mlp_dim=17408
        ),
        # There is no base model of this size; the others' trained versions have 40960 positions too.
        "qwen3-32b": _qwen3(
            tie_embeddings=False,
            max_positions=40960,
            emb_dim=5120,
            num_layers=64,
            num_heads=64,
            mlp_dim=25600,
        ),
        "gemma-2-2b": _gemma2(
            emb_dim=2304, num_layers=26, num_heads=8, num_kv_heads=4, mlp_dim=9216
        ),
        "gemma-2-9b": _gemma2(
            emb_dim=3584, num_layers=42, num_heads=16, num_kv_heads=8, mlp_dim=14336
        ),
        "gemma-2-27b": _gemma2(
            emb_dim=4608,
            num_layers=46,
            num_heads=32,
            num_kv_heads=16,
            head_dim=128,
            mlp_dim=36864,
            query_pre_attn_scalar=144,
        ),
        "gemma-3-270m": _gemma3(
            reads_images=False,
            window=512,
            emb_dim=640,
            num_layers=18,
            num_heads=4,
            num_kv_heads=1,
            mlp_dim=2048,
        ),
        "gemma-3-1b": _gemma3(
            reads_images=False,
            window=512,
            emb_dim=1152,
            num_layers=26,
            num_heads=4,
            num_kv_heads=1,
            mlp_dim=6912,
        ),
        "gemma-3-4b": _gemma3(
            reads_images=True,
            window=1024,
            emb_dim=2560,
            num_layers=34,
            num_heads=8,
            num_kv_heads=4,
            mlp_dim=10240,
        ),
        "gemma-3-12b": _gemma3(
            reads_images=True,
            window=1024,
            emb_dim=3840,
            num_layers=48,
            num_heads=16,
            num_kv_heads=8,
            mlp_dim=15360,
        ),
        "gemma-3-27b": _gemma3(
            reads_images=True,
            window=1024,
            emb_dim=5376,
            num_layers=62,
            num_heads=32,
            num_kv_heads=16,
            head_dim=128,
            mlp_dim=21504,
            query_pre_attn_scalar=168,
        ),
    }
)


def preset(name: str, **overrides: object) -> ModelConfig:
    """Returns the config of a published size.

    Args:
      name: a key of PRESETS or T5_PRESETS, in any case ("SmolLM2-135M").
      **overrides: fields of its config to change, for example `dtype="bfloat16"`.

    Raises:
      ConfigError: if there is no such preset or field, or a field's value is not allowed.
    """
    presets = {**PRESETS, **T5_PRESETS}
    config = presets.get(name.lower())
    if config is None:
        raise ConfigError(f"model.preset={name!r} is not allowed: one of {', '.join(presets)}")
    known = [field.name for field in dataclasses.fields(config)]
    for field, value in overrides.items():
        if field not in known:
            raise ConfigError(
                f"model.{field}={value!r} is not allowed: the fields are {', '.join(known)}"
            )
    return dataclasses.replace(config, **overrides)


def count_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters of a model without adapters."""
    if isinstance(config, EncoderDecoderConfig):
        return count_t5_parameters(config)
    width, queries = config.emb_dim, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = 2 * width * queries + 2 * width * keys
    if config.qkv_bias:
        attention += queries + 2 * keys
    if config.qk_norm:
        attention += 2 * config.head_dim
    norms = 4 if config.sandwich_norms else 2
    block = attention + 3 * width * config.mlp_dim + norms * width
    tables = 1 if config.tie_embeddings else 2
    return tables * config.vocab_size * width + config.num_layers * block + width
