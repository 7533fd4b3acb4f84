"""ResLoRA, arXiv 2402.18039: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import ResLoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of ResLoRAConfig with their defaults, but for `changes`."""
    return adapter_section(ResLoRAConfig, **changes)
