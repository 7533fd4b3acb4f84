"""Logits of the T5 family against numbers that transformers computed (tests/parity/make_t5_reference.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from sira_jax.checkpoints import load_base_model
from sira_jax.models import make_model
from tests.hf_models import write_folder
from tests.hf_t5_models import t5_inputs, t5_weights_by_rule

MODELS = json.loads((Path(__file__).parent / "t5_reference.json").read_text())["models"]


def logits(model, positions):
    batch = {
        name: np.asarray(ids, np.int32) for name, ids in t5_inputs(model.config.vocab_size).items()
    }
    found = make_model(model.config).apply({"params": model.params}, batch)
    return np.asarray(found)[:, positions]


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name, scan_layers):
    expected = MODELS[name]
    folder = write_folder(tmp_path, expected["config"], t5_weights_by_rule(expected["config"]))
    model = load_base_model(folder, scan_layers=scan_layers)
    found = logits(model, expected["positions"])
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("t5-1.0", {"layer_norm_epsilon": 1e-1}),
        ("t5-1.1", {"relative_attention_max_distance": 64}),
        ("mt5", {"feed_forward_proj": "gated-silu"}),
    ],
)
def test_the_numbers_would_show_a_difference(tmp_path, name, change):
    expected = MODELS[name]
    config = {**expected["config"], **change}
    model = load_base_model(write_folder(tmp_path, config, t5_weights_by_rule(config)))
    found = logits(model, expected["positions"])
    assert np.abs(found - expected["logits"]).max() > 2e-3
