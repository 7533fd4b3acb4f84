"""Which model a config is of."""

from types import MappingProxyType

from sira_jax.adapters import AdapterConfig
from sira_jax.errors import ConfigError
from sira_jax.models.config import DecoderConfig
from sira_jax.models.decoder import Decoder
from sira_jax.models.encoder_decoder import EncoderDecoder
from sira_jax.models.encoder_decoder_config import EncoderDecoderConfig

MODELS = MappingProxyType({DecoderConfig: Decoder, EncoderDecoderConfig: EncoderDecoder})
# The fields of their configs that count blocks.
DEPTHS = ("num_layers", "num_encoder_layers", "num_decoder_layers")
Model = Decoder | EncoderDecoder
ModelConfig = DecoderConfig | EncoderDecoderConfig


def make_model(
    config: ModelConfig, adapter: AdapterConfig | None = None, num_tasks: int = 0
) -> Model:
    """The model of a config, of the class that MODELS has for the config's type.

    Args:
      config: sizes and options.
      adapter: adapter for the projections it targets, or None for the frozen model.
      num_tasks: how many tasks the router's metrics tell apart; 0 for none.

    Raises:
      ConfigError: if the config is of no model.
    """
    model = MODELS.get(type(config))
    if model is None:
        known = ", ".join(kind.__name__ for kind in MODELS)
        raise ConfigError(f"model={config!r} is not allowed: one of {known}")
    return model(config, adapter, num_tasks)
