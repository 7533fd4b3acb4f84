"""Defaults of every experiment. An experiment file calls `get_config` here and changes what differs.

tests/configs holds the fields and defaults to those of sira_jax/training/config.py.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from sira_jax.training.bad_loss import BadLossConfig
from sira_jax.training.config import (
    DecodeConfig,
    EvaluateConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)


def section(dataclass_type: type, **changes) -> ConfigDict:
    """A section with the defaults of its dataclass. A default of None can still be set to a number."""
    config = ConfigDict()
    for field in dataclasses.fields(dataclass_type):
        value = changes.pop(field.name, field.default)
        if value is None:
            value = config_dict.placeholder(int if field.type == int | None else float)
        if value is not dataclasses.MISSING:
            config[field.name] = value
    config.update(changes)
    return config


def adapter_section(config_type: type, **changes) -> ConfigDict:
    """The section of an adapter method: its fields and `method`."""
    return section(config_type, method=config_type.method, **changes)


def get_config() -> ConfigDict:
    """Every section but `adapter`, which the files in configs/adapters give."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.path = (
        "smollm2-135m"  # A GGUF file, a Hugging Face folder, or a name of download_data.py.
    )
    config.model.dtype = "float32"  # Type of the computation; bfloat16 on accelerators.
    config.model.param_dtype = "float32"  # Type the frozen base is held in.
    config.model.remat_policy = (
        "none"  # none | full | projections | dots | dots_no_batch: memory against time.
    )
    config.model.scan_layers = True  # One compiled block for all layers.
    config.model.quantization = "none"  # none | int8 | int4 | nf4, of the frozen projections.

    config.data = ConfigDict()
    config.data.tasks = ("cldr_all",)  # Tasks or mixtures; scripts/show_task.py --list names them.
    config.data.rates = "mixture"  # mixture | equal | proportional | temperature.
    config.data.temperature = 2.0  # For rates=temperature.
    config.data.template = "plain"  # plain | chat (the model's own template).
    config.data.vocabulary = (
        "model"  # The model's tokenizer, or bytes, sentencepiece:FILE, tokenizers:FILE.
    )
    config.data.sequence_length = 256  # Tokens a row; of the encoder's rows where there is one.
    config.data.target_length = 0  # Tokens a row of the decoder behind an encoder; 0: as many.
    config.data.batch_size = 8  # Rows a step, over all devices.
    config.data.pack = True  # Several examples a row.
    config.data.too_long = "error"  # error | drop | truncate_inputs.

    config.optimizer = section(OptimizerConfig)
    config.train = section(TrainConfig)
    config.decode = section(DecodeConfig)
    config.evaluate = section(EvaluateConfig)
    config.mesh = section(MeshConfig)
    config.bad_loss = section(BadLossConfig)
    return config
