"""Trained and frozen parameters apart, and fresh adapters."""

import jax
import numpy as np
import pytest

from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError
from sira_jax.models import Decoder
from sira_jax.training.train_state import (
    abstract_params,
    count,
    init_adapter,
    merge_params,
    split_params,
)
from tests.tiny import decoder_config, decoder_params

SIRA = SiRAConfig(num_experts=4, num_selected_experts=2, rank=2, targets=("down",))


def test_split_and_merge_are_inverse():
    params = decoder_params(Decoder(decoder_config(), SIRA))
    trained, frozen = split_params(params)
    assert count(trained) + count(frozen) == count(params)
    paths = [
        [entry.key for entry in path] for path, _ in jax.tree_util.tree_leaves_with_path(trained)
    ]
    assert len(paths) == 3
    assert all("adapter" in path for path in paths)
    jax.tree.map(np.testing.assert_array_equal, merge_params(trained, frozen), params)


def test_init_adapter_is_the_models_own_initialisation():
    model = Decoder(decoder_config(), SIRA)
    adapter = init_adapter(model, 3)
    boxes = split_params(abstract_params(model))[0]
    shapes = jax.tree.map(lambda box: box.value.shape, boxes, is_leaf=lambda x: hasattr(x, "names"))
    assert jax.tree.map(lambda leaf: leaf.shape, adapter) == shapes
    down = adapter["layers"]["mlp"]["down"]["adapter"]
    assert not np.any(down["lora_b"])
    assert np.any(down["router"][0] != down["router"][1])
    other = init_adapter(model, 4)["layers"]["mlp"]["down"]["adapter"]
    assert np.any(other["router"] != down["router"])


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"adapter\.targets=\('query',\)"):
        init_adapter(Decoder(decoder_config(), LoRAConfig(targets="query")), 0)


def test_frozen_model_has_no_adapter():
    assert init_adapter(Decoder(decoder_config()), 0) == {}
