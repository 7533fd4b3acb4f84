"""DoRA (dynamic rank), arXiv 2405.17357: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import DynamicDoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of DynamicDoRAConfig with their defaults, but for `changes`."""
    return adapter_section(DynamicDoRAConfig, **changes)
