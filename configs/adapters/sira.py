"""SiRA, arXiv 2311.09179: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import SiRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of SiRAConfig with their defaults, but for `changes`."""
    return adapter_section(SiRAConfig, **changes)
