"""MELoRA, arXiv 2402.17263: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import MELoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of MELoRAConfig with their defaults, but for `changes`."""
    return adapter_section(MELoRAConfig, **changes)
