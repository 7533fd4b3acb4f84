"""Logits against numbers that transformers computed (tests/parity/make_reference.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from sira_jax.checkpoints import load_base_model
from sira_jax.models.decoder import Decoder
from tests.hf_models import weights_by_rule, write_folder

REFERENCE = json.loads((Path(__file__).parent / "llama_reference.json").read_text())
MODELS = REFERENCE["models"]


def logits(model, ids):
    batch = {"decoder_input_tokens": np.asarray([ids])}
    return np.asarray(Decoder(model.config).apply({"params": model.params}, batch))[0]


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name, scan_layers):
    expected = MODELS[name]
    folder = write_folder(tmp_path, expected["config"], weights_by_rule(expected["config"]))
    model = load_base_model(folder, scan_layers=scan_layers)
    found = logits(model, expected["token_ids"])[expected["positions"]]
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-4)


def test_the_numbers_would_show_a_difference(tmp_path):
    """Rope scaling, biases and the base of the rotary frequencies each move them by far more."""
    for name, change in (
        ("llama-tied-scaled", {"rope_scaling": None}),
        ("llama", {"rope_theta": 500000.0}),
        ("qwen2", {"rms_norm_eps": 1e-1}),
    ):
        expected = MODELS[name]
        config = {**expected["config"], **change}
        model = load_base_model(write_folder(tmp_path / name, config, weights_by_rule(config)))
        found = logits(model, expected["token_ids"])[expected["positions"]]
        assert np.abs(found - expected["logits"]).max() > 1e-2
