"""MiLoRA, arXiv 2410.18035: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import MiLoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of MiLoRAConfig with their defaults, but for `changes`."""
    return adapter_section(MiLoRAConfig, **changes)
