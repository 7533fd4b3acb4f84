"""Language models with adapted projections."""

from sira_jax.models.config import DecoderConfig, RopeScaling
from sira_jax.models.decoder import Decoder

__all__ = ["Decoder", "DecoderConfig", "RopeScaling"]
