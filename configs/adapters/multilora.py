"""MultiLoRA, arXiv 2311.11501: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import MultiLoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of MultiLoRAConfig with their defaults, but for `changes`."""
    return adapter_section(MultiLoRAConfig, **changes)
