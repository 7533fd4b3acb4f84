"""LoRA, arXiv 2106.09685: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import LoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of LoRAConfig with their defaults, but for `changes`."""
    return adapter_section(LoRAConfig, **changes)
