"""DoRA (weight-decomposed), arXiv 2402.09353: the adapter section of an experiment."""

from ml_collections import ConfigDict

from configs.base import adapter_section
from sira_jax.adapters import DoRAConfig


def get_config(**changes) -> ConfigDict:
    """All fields of DoRAConfig with their defaults, but for `changes`."""
    return adapter_section(DoRAConfig, **changes)
