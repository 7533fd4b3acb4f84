"""Published sizes of the T5 family by name; see presets.py. Source: the gin files of T5X's examples [O]."""

from types import MappingProxyType

from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig

# emb_dim, heads, layers of encoder and decoder, width of a head, width of the MLP.
_T5_1_0 = {
    "small": (512, 8, 6, 6, 64, 2048),
    "base": (768, 12, 12, 12, 64, 3072),
    "large": (1024, 16, 24, 24, 64, 4096),
    "3b": (1024, 32, 24, 24, 128, 16384),
    "11b": (1024, 128, 24, 24, 128, 65536),
}
_T5_1_1 = {
    "small": (512, 6, 8, 8, 64, 1024),
    "base": (768, 12, 12, 12, 64, 2048),
    "large": (1024, 16, 24, 24, 64, 2816),
    "xl": (2048, 32, 24, 24, 64, 5120),
    "xxl": (4096, 64, 24, 24, 64, 10240),
}
_BYT5 = {
    "small": (1472, 6, 12, 4, 64, 3584),
    "base": (1536, 12, 18, 6, 64, 3968),
    "large": (1536, 16, 36, 12, 64, 3840),
    "xl": (2560, 32, 36, 12, 64, 6720),
    "xxl": (4672, 64, 36, 12, 64, 12352),
}


def _family(vocab_size: int, sizes: dict[str, tuple[int, ...]], **fields: object) -> dict:
    names = (
        "emb_dim",
        "num_heads",
        "num_encoder_layers",
        "num_decoder_layers",
        "head_dim",
        "mlp_dim",
    )
    return {
        size: EncoderDecoderConfig(
            vocab_size=vocab_size, **dict(zip(names, values, strict=True)), **fields
        )
        for size, values in sizes.items()
    }


_VOCABULARY = 32128  # 32,000 pieces and 100 extra ids, rounded up to a multiple of 128
_GATED = _family(_VOCABULARY, _T5_1_1)
_FAMILIES = {
    "t5-1.0": _family(_VOCABULARY, _T5_1_0, mlp_activations=("relu",), tie_embeddings=True),
    # Trained on from the same sizes: 1.1 as it is, adapted to language modelling, or on FLAN's instructions.
    "t5-1.1": _GATED,
    "t5-lm-adapt": _GATED,
    "flan-t5": _GATED,
    "mt5": _family(250112, _T5_1_1),
    "byt5": _family(384, _BYT5),
}
T5_PRESETS = MappingProxyType(
    {
        "t5-tiny": EncoderDecoderConfig(
            vocab_size=384,
            emb_dim=64,
            num_heads=4,
            head_dim=16,
            mlp_dim=128,
            num_encoder_layers=2,
            num_decoder_layers=2,
        )
    }
    | {
        f"{family}-{size}": config
        for family, sizes in _FAMILIES.items()
        for size, config in sizes.items()
    }
)


def count_t5_parameters(config: EncoderDecoderConfig) -> int:
    """Returns the number of parameters of the encoder-decoder without adapters."""
    table = config.num_heads * config.relpos_num_buckets
    tables = 1 if config.tie_embeddings else 2
    total = tables * config.vocab_size * config.emb_dim
    for stack, norms in zip(config.stacks, (2, 3), strict=True):
        matrices = sum(d_in * d_out for d_in, d_out in stack.projections.values())
        total += stack.num_layers * (matrices + norms * config.emb_dim) + config.emb_dim
        total += table * (stack.num_layers if config.relpos_per_layer else 1)
    return total
