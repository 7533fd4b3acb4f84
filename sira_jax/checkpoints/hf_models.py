"""Which config a Hugging Face folder has, by its model_type, and how each config is written."""

import os
from types import MappingProxyType

from sira_jax.checkpoints.hf_config import (
    CONFIG,
    MODEL_TYPES,
    Fields,
    read_decoder_config,
    to_hf_config,
)
from sira_jax.checkpoints.hf_t5_config import T5_FAMILIES, read_t5_config, t5_to_hf_config
from sira_jax.checkpoints.safetensors import read_json
from sira_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig

_READERS = MappingProxyType(
    dict.fromkeys(MODEL_TYPES, read_decoder_config) | dict.fromkeys(T5_FAMILIES, read_t5_config)
)
_WRITERS = MappingProxyType({DecoderConfig: to_hf_config, EncoderDecoderConfig: t5_to_hf_config})


def read_model_config(path: str, **options: object) -> ModelConfig:
    """Returns the config of the model in a Hugging Face folder.

    Args:
      path: the folder.
      **options: fields of the config that a checkpoint does not give: dtype, param_dtype,
        scan_layers, remat_policy.

    Raises:
      ModelFileError: naming the field and what is supported, if no model here computes what the
        file describes.
    """
    file = os.path.join(path, CONFIG)
    content = read_json(file)
    model_type = content.get("model_type")
    reader = _READERS.get(model_type) if isinstance(model_type, str) else None
    if reader is None:
        raise Fields(file, content).fail("model_type", f"one of {', '.join(_READERS)}")
    return reader(path, **options)


def write_model_config(config: ModelConfig) -> dict[str, object]:
    """Returns the fields of a config.json that describe a model."""
    return _WRITERS[type(config)](config)
