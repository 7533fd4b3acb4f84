"""Adapters for frozen projections: one file a method."""

from sira_jax.adapters.base import (
    PROJECTIONS,
    AdaptedDense,
    AdapterConfig,
    AdapterContext,
    AdapterFlops,
    is_trained,
    merge,
)
from sira_jax.adapters.lora import LoRAConfig
from sira_jax.adapters.registry import METHODS, make_config
from sira_jax.adapters.sira import SiRAConfig

__all__ = [
    "METHODS",
    "PROJECTIONS",
    "AdaptedDense",
    "AdapterConfig",
    "AdapterContext",
    "AdapterFlops",
    "LoRAConfig",
    "SiRAConfig",
    "is_trained",
    "make_config",
    "merge",
]
