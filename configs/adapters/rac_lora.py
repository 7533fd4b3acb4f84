"""RAC-LoRA, arXiv 2410.08305: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import RACLoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of RACLoRAConfig with their defaults, but for `changes`."""
    return adapter_section(RACLoRAConfig, **changes)
