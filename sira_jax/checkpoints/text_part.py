"""The language model of a checkpoint that holds other models beside it, such as Gemma 3 with its reader of images.

Source: the names in the published checkpoints, older and newer, as transformers maps them [O].
"""

import re

import numpy as np

from sira_jax.checkpoints.safetensors import TensorSource

# Older files: language_model.model.layers..., language_model.lm_head...; newer: model.language_model.layers..., lm_head...
_TEXT = re.compile(
    r"(?:language_model\.model\.|model\.language_model\.)(.+)|language_model\.(lm_head\..+)"
)
_OTHERS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


class TextPart:
    """A TensorSource under the names that a checkpoint of the language model alone has."""

    def __init__(self, source: TensorSource):
        self.path = source.path
        self._source = source
        self._of = {_name(own): own for own in source.shapes if not _OTHERS.match(own)}
        self.shapes = {name: source.shapes[own] for name, own in self._of.items()}

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read_rows(self._of[name], start, stop)

    def stored_name(self, name: str) -> str:
        return self._of.get(name, name)


def text_part(source: TensorSource) -> TensorSource:
    """The source itself, or its language model where there is one among others."""
    return TextPart(source) if any(map(_TEXT.fullmatch, source.shapes)) else source


def _name(own: str) -> str:
    match = _TEXT.fullmatch(own)
    if match is None:
        return own
    return match[2] or f"model.{match[1]}"
