"""MoLoRA, arXiv 2309.05444: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import MoLoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of MoLoRAConfig with their defaults, but for `changes`."""
    return adapter_section(MoLoRAConfig, **changes)
