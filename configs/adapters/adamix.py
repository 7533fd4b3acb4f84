"""AdaMix, arXiv 2205.12410: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import AdaMixConfig


def get_config(**changes) -> ConfigDict:
    """All fields of AdaMixConfig with their defaults, but for `changes`."""
    return adapter_section(AdaMixConfig, **changes)
