"""XGBLoRA, arXiv 2410.19694: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import XGBLoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of XGBLoRAConfig with their defaults, but for `changes`."""
    return adapter_section(XGBLoRAConfig, **changes)
