"""Adapters of every method as our folders and PEFT's."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from sira_jax.adapters import METHODS
from sira_jax.checkpoints import peft
from sira_jax.checkpoints.adapter_file import abstract_adapter, load_adapter, save_adapter
from sira_jax.models import ModelConfig, make_model
from tests.adapters.test_every_method import make
from tests.tiny import decoder_config, decoder_params, draw

BASE = "0123456789abcdef" * 4


DECODER = decoder_config()


def make_adapters(folder: Path) -> None:
    for method in METHODS:
        config = make(method)
        tree = _drawn(config)
        save_adapter(folder / method, config, tree, DECODER, BASE)


def _drawn(config: Any, model_config: ModelConfig = DECODER) -> Any:
    return draw(abstract_adapter(config, model_config), seed=3)


def check_adapter(config: Any, tree: Any) -> None:
    expected = jax.tree.map(lambda x: tuple(x.shape), abstract_adapter(config, DECODER))
    assert jax.tree.map(lambda x: tuple(x.shape), tree) == expected


def load_one_adapter(folder: Path) -> None:
    check_adapter(*load_adapter(folder, DECODER, BASE))


@functools.cache
def base_params() -> Any:
    return decoder_params(make_model(DECODER))


def make_peft(folder: Path) -> None:
    overrides = {"down": {"rank": 3}, "q": {"alpha": 2.5}}
    for method in ("lora", "dora"):
        fields = {"rank": 2, "targets": ["q", "down", "gate"], "overrides": overrides}
        config = dataclasses.replace(make(method), **fields)
        peft.save_peft(folder / method, config, _drawn(config), DECODER, base_params())


def load_peft(folder: Path) -> None:
    check_adapter(*peft.load_peft(folder, DECODER, base_params()))
