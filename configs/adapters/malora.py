"""MALoRA, arXiv 2410.22782: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import MALoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of MALoRAConfig with their defaults, but for `changes`."""
    return adapter_section(MALoRAConfig, **changes)
