"""Adapters for frozen projections: one file a method."""

from sira_jax.adapters.base import (
    PROJECTIONS,
    AdaptedDense,
    AdapterConfig,
    AdapterFlops,
    SecondPass,
    StepInfo,
    is_adapter,
    is_trained,
)
from sira_jax.adapters.context import AdapterContext, LayerLink, Projection
from sira_jax.adapters.lora import LoRAConfig
from sira_jax.adapters.registry import METHODS, make_config
from sira_jax.adapters.sira import SiRAConfig
from sira_jax.adapters.trees import count_model_parameters, merge, split_trained

__all__ = [
    "METHODS",
    "PROJECTIONS",
    "AdaptedDense",
    "AdapterConfig",
    "AdapterContext",
    "AdapterFlops",
    "LayerLink",
    "LoRAConfig",
    "Projection",
    "SecondPass",
    "SiRAConfig",
    "StepInfo",
    "count_model_parameters",
    "is_adapter",
    "is_trained",
    "make_config",
    "merge",
    "split_trained",
]
