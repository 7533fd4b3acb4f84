"""Language models with adapted projections."""

from sira_jax.models.adapter_init import fresh_adapter
from sira_jax.models.config import DecoderConfig, RopeScaling
from sira_jax.models.decoder import Decoder
from sira_jax.models.encoder_decoder import EncoderDecoder
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig
from sira_jax.models.factory import DEPTHS, MODELS, Model, ModelConfig, make_model
from sira_jax.models.stacks import Stack

__all__ = [
    "DEPTHS",
    "MODELS",
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Model",
    "ModelConfig",
    "RopeScaling",
    "Stack",
    "fresh_adapter",
    "make_model",
]
