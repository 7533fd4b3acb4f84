"""Hugging Face config.json of the T5 family to EncoderDecoderConfig and back. Field meanings and defaults: the transformers
library [O].
"""

import dataclasses
import os

from sira_jax.checkpoints.hf_config import CONFIG, Fields
from sira_jax.checkpoints.safetensors import read_json
from sira_jax.errors import ConfigError, ModelFileError
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class _Family:
    """What transformers assumes of a model_type.

    Attributes:
      feed_forward: feed_forward_proj where config.json is silent.
      may_scale: the logits may be scaled; see `_is_tied`.
      relpos_per_layer: every block has its own relative positions.
    """

    feed_forward: str = "gated-gelu"
    may_scale: bool = True
    relpos_per_layer: bool = False


T5_FAMILIES = {
    "t5": _Family(feed_forward="relu"),
    "mt5": _Family(may_scale=False),
    "umt5": _Family(relpos_per_layer=True),
}
# "gated-gelu" has the tanh approximation there; the exact "gelu" of a plain MLP is not among our activations.
_FEED_FORWARD = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gelu_new": ("gelu",),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
}
# T5 has no limit; published configs name the length of pretraining in n_positions, if anything.
_MAX_POSITIONS = EncoderDecoderConfig.max_positions


def read_t5_config(path: str, **options: object) -> EncoderDecoderConfig:
    """Returns the EncoderDecoderConfig that a folder's config.json describes.

    `max_positions` is the default of EncoderDecoderConfig, or n_positions where that is more.

    Args:
      path: the folder.
      **options: fields of EncoderDecoderConfig that a checkpoint does not give: dtype,
        param_dtype, scan_layers, remat_policy.

    Raises:
      ModelFileError: naming the field and what is supported, if the model cannot compute what the
        file describes.
    """
    file = os.path.join(path, CONFIG)
    content = read_json(file)
    fields = Fields(file, content)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in T5_FAMILIES:
        raise fields.fail("model_type", f"one of {', '.join(T5_FAMILIES)}")
    family = T5_FAMILIES[model_type]
    if content.get("quantization_config") is not None:
        raise ModelFileError(f"{file}: quantization_config is not supported: load the full model")
    if content.get("is_encoder_decoder") is False:
        raise fields.fail("is_encoder_decoder", "true, the encoder alone is no language model")
    num_layers = fields.count("num_layers")
    start = content.get("decoder_start_token_id")
    try:
        return EncoderDecoderConfig(
            vocab_size=fields.count("vocab_size"),
            emb_dim=fields.count("d_model"),
            num_heads=fields.count("num_heads"),
            head_dim=fields.count("d_kv"),
            mlp_dim=fields.count("d_ff"),
            num_encoder_layers=num_layers,
            num_decoder_layers=fields.count("num_decoder_layers", num_layers),
            mlp_activations=_read_activations(fields, family),
            tie_embeddings=_is_tied(fields, family),
            norm_eps=fields.number("layer_norm_epsilon", 1e-6),
            relpos_num_buckets=fields.count("relative_attention_num_buckets", 32),
            relpos_max_distance=fields.count("relative_attention_max_distance", 128),
            relpos_per_layer=family.relpos_per_layer,
            max_positions=max(_MAX_POSITIONS, fields.count("n_positions", 1)),
            decoder_start_id=0 if start is None else start,
            **options,
        )
    except ConfigError as error:
        raise ModelFileError(f"{file}: {error}") from None


def _is_tied(fields: Fields, family: _Family) -> bool:
    """Whether the logits reuse the token embedding, scaled.

    tie_word_embeddings says this up to transformers 4. From 5 on it is always true when written, tensors alone tell whether
    there are two, and scale_decoder_outputs says whether T5 1.0's scaling goes with it; mT5 never has it. A model that ties
    without scaling is loaded as one whose two matrices are equal.
    """
    is_tied = fields.content.get("tie_word_embeddings") is None or fields.flag(
        "tie_word_embeddings"
    )
    if fields.content.get("scale_decoder_outputs") is not None:
        is_tied = fields.flag("scale_decoder_outputs")
    return family.may_scale and is_tied


def _read_activations(fields: Fields, family: _Family) -> tuple[str, ...]:
    name = fields.content.get("feed_forward_proj")
    name = family.feed_forward if name is None else name
    if not isinstance(name, str) or name not in _FEED_FORWARD:
        raise fields.fail("feed_forward_proj", f"one of {', '.join(_FEED_FORWARD)}")
    activations = _FEED_FORWARD[name]
    is_gated = len(activations) == 2
    if fields.content.get("is_gated_act") not in (None, is_gated):
        raise fields.fail("is_gated_act", f"{is_gated}, as feed_forward_proj={name!r} says")
    return activations


def t5_to_hf_config(config: EncoderDecoderConfig) -> dict[str, object]:
    """Returns the fields of a config.json: of umt5 if every block has its own relative positions, else of t5.

    Raises:
      ModelFileError: if Hugging Face has no name for the activations.
    """
    names = [name for name, found in _FEED_FORWARD.items() if found == config.mlp_activations]
    if not names:
        raise ModelFileError(
            f"model.mlp_activations={config.mlp_activations!r} cannot be written: Hugging Face has "
            f"{', '.join(_FEED_FORWARD)}"
        )
    model_type = "umt5" if config.relpos_per_layer else "t5"
    return {
        "architectures": [f"{model_type.upper()}ForConditionalGeneration"],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": names[0],
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "n_positions": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start_id,
        "torch_dtype": config.param_dtype,
    }
