"""Adapters for frozen projections: one file a method."""

from sira_jax.adapters.adamix import AdaMixConfig
from sira_jax.adapters.base import (
    PROJECTIONS,
    AdapterConfig,
    AdapterFlops,
    SecondPass,
    StepInfo,
    is_adapter,
    is_trained,
)
from sira_jax.adapters.context import AdapterContext, LayerLink, Projection
from sira_jax.adapters.dense import AdaptedDense
from sira_jax.adapters.dora import DoRAConfig
from sira_jax.adapters.dynamic_dora import DynamicDoRAConfig
from sira_jax.adapters.lora import LoRAConfig
from sira_jax.adapters.malora import MALoRAConfig
from sira_jax.adapters.melora import MELoRAConfig
from sira_jax.adapters.milora import MiLoRAConfig
from sira_jax.adapters.molora import MoLoRAConfig
from sira_jax.adapters.mov import MoVConfig
from sira_jax.adapters.multilora import MultiLoRAConfig
from sira_jax.adapters.rac_lora import RACLoRAConfig
from sira_jax.adapters.registry import METHODS, make_config
from sira_jax.adapters.reslora import ResLoRAConfig
from sira_jax.adapters.sira import SiRAConfig
from sira_jax.adapters.trees import count_model_parameters, merge, partition, split_trained
from sira_jax.adapters.xgblora import XGBLoRAConfig

__all__ = [
    "METHODS",
    "PROJECTIONS",
    "AdaMixConfig",
    "AdaptedDense",
    "AdapterConfig",
    "AdapterContext",
    "AdapterFlops",
    "DoRAConfig",
    "DynamicDoRAConfig",
    "LayerLink",
    "LoRAConfig",
    "MALoRAConfig",
    "MELoRAConfig",
    "MiLoRAConfig",
    "MoLoRAConfig",
    "MoVConfig",
    "MultiLoRAConfig",
    "Projection",
    "RACLoRAConfig",
    "ResLoRAConfig",
    "SecondPass",
    "SiRAConfig",
    "StepInfo",
    "XGBLoRAConfig",
    "count_model_parameters",
    "is_adapter",
    "is_trained",
    "make_config",
    "merge",
    "partition",
    "split_trained",
]
