"""Logits against numbers that transformers computed (tests/parity/make_reference.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from sira_jax.checkpoints import load_base_model
from sira_jax.models.decoder import Decoder
from tests.hf_models import weights_by_rule, write_folder

REFERENCE = json.loads((Path(__file__).parent / "reference_logits.json").read_text())
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
    """What config.json says of rotary positions, norms, windows, caps and scale each moves them by far more."""
    for name, change in (
        ("llama-tied-scaled", {"rope_scaling": None}),
        ("llama", {"rope_theta": 500000.0}),
        ("qwen2", {"rms_norm_eps": 1e-1}),
        ("mistral-window", {"sliding_window": 7}),
        ("qwen2-window", {"max_window_layers": 2}),
        ("gemma2", {"sliding_window": 6}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 12}),
        ("gemma3", {"rope_local_base_freq": 1000000.0}),
        ("gemma3-scaled", {"rope_scaling": None}),
    ):
        expected = MODELS[name]
        config = {**expected["config"], **change}
        model = load_base_model(write_folder(tmp_path / name, config, weights_by_rule(config)))
        found = logits(model, expected["token_ids"])[expected["positions"]]
        assert np.abs(found - expected["logits"]).max() > 1e-2
