"""Base models and checkpoints: one file a format. `orbax` is imported by whoever needs it."""

from sira_jax.checkpoints.base_model import (
    BaseModel,
    load_base_model,
    read_base_model,
    read_config,
    save_hf_folder,
)
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.checkpoints.tokenizer import SpecialTokens

__all__ = [
    "BaseModel",
    "SpecialTokens",
    "fingerprint",
    "load_base_model",
    "read_base_model",
    "read_config",
    "save_hf_folder",
]
