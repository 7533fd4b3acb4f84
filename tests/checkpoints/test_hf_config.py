"""config.json of Hugging Face folders: what is read and what is refused."""

import json

import pytest

from sira_jax.checkpoints import read_config
from sira_jax.checkpoints.hf_config import read_decoder_config, to_hf_config
from sira_jax.errors import ModelFileError
from sira_jax.models.config import DecoderConfig, RopeScaling
from sira_jax.models.presets import PRESETS, preset
from tests.hf_models import LLAMA3_ROPE, TINY_LLAMA, TINY_QWEN2


def test_config_fields(tmp_path):
    config = {**TINY_QWEN2, "head_dim": 12, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = read_config(tmp_path, dtype="bfloat16", remat_policy="full")
    assert found == DecoderConfig(
        vocab_size=96,
        emb_dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        mlp_dim=48,
        norm_eps=1e-6,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor=8.0, original_max_positions=64),
        tie_embeddings=True,
        qkv_bias=True,
        max_positions=128,
        dtype="bfloat16",
        remat_policy="full",
    )


def _changed(**changes: object) -> dict:
    config = {**TINY_LLAMA, **changes}
    return {key: value for key, value in config.items() if value != "gone"}


ACCEPTED = {
    "mistral without a window": (
        _changed(model_type="mistral", sliding_window=None),
        {"tie_embeddings": False},
    ),
    "mistral, window as long as the positions": (
        _changed(model_type="mistral", sliding_window=128),
        {},
    ),
    "mistral, window not given": (_changed(model_type="mistral"), {}),
    "llama of old: heads for key heads, defaults": (
        _changed(num_key_value_heads="gone", rope_theta="gone", tie_word_embeddings="gone"),
        {"num_kv_heads": 4, "rope_theta": 10000.0, "tie_embeddings": False},
    ),
    "rope_scaling null": (_changed(rope_scaling=None), {"rope_scaling": None}),
    "rope_scaling default": (_changed(rope_scaling={"type": "default"}), {"rope_scaling": None}),
    "rope_parameters": (
        _changed(rope_theta="gone", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        {"rope_theta": 5e5, "rope_scaling": None},
    ),
    "rope_parameters llama3": (
        _changed(rope_theta="gone", rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}),
        {
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling(factor=8.0, original_max_positions=64),
        },
    ),
    "biases named and absent": (_changed(attention_bias=False, mlp_bias=False), {}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_configs_that_are_read(tmp_path, case):
    content, expected = ACCEPTED[case]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, _ = read_config(tmp_path)
    assert {field: getattr(config, field) for field in expected} == expected


REFUSED = {
    "other model_type": (_changed(model_type="gpt2"), "model_type='gpt2'.*llama, mistral, qwen2"),
    "no model_type": (_changed(model_type="gone"), "model_type=None.*llama, mistral, qwen2"),
    "model_type no text": (_changed(model_type=["llama"]), "llama, mistral, qwen2"),
    "mistral window": (
        _changed(model_type="mistral", sliding_window=64),
        "sliding_window=64.*max_position_embeddings=128",
    ),
    "mistral default window": (
        _changed(model_type="mistral", max_position_embeddings=8192),
        "sliding_window=4096.*8192",
    ),
    "qwen2 window": (
        {**TINY_QWEN2, "use_sliding_window": True},
        "sliding_window=32.*max_position_embeddings=128",
    ),
    "mistral key heads not given": (
        _changed(model_type="mistral", num_key_value_heads="gone"),
        "num_key_value_heads is missing",
    ),
    "attention_bias": (_changed(attention_bias=True), "attention_bias=True"),
    "mlp_bias": (_changed(mlp_bias=True), "mlp_bias=True"),
    "other activation": (_changed(hidden_act="gelu"), "hidden_act='gelu'.*silu"),
    "yarn": (_changed(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_type='yarn'.*llama3"),
    "linear": (
        _changed(rope_parameters={"rope_type": "linear", "factor": 2.0}),
        "rope_parameters.rope_type='linear'",
    ),
    "rope by layer": (
        _changed(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "rope_parameters=.*one object",
    ),
    "llama3 without factor": (
        _changed(rope_scaling={k: v for k, v in LLAMA3_ROPE.items() if k != "factor"}),
        "factor is missing",
    ),
    "llama3 factors swapped": (
        _changed(rope_scaling={**LLAMA3_ROPE, "high_freq_factor": 0.5}),
        "high_freq_factor=0.5",
    ),
    "partial rotary": (_changed(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "quantised": (_changed(quantization_config={"quant_method": "awq"}), "quantization_config"),
    "missing vocab_size": (_changed(vocab_size="gone"), "field vocab_size is missing"),
    "missing hidden_size": (_changed(hidden_size="gone"), "field hidden_size is missing"),
    "text for a number": (_changed(num_hidden_layers="3"), "num_hidden_layers='3'.*whole number"),
    "zero heads": (_changed(num_attention_heads=0), "num_attention_heads=0"),
    "negative eps": (_changed(rms_norm_eps=-1.0), "rms_norm_eps=-1.0"),
    "true for a number": (_changed(rms_norm_eps=True), "rms_norm_eps=True"),
    "heads do not divide": (_changed(num_attention_heads=5), "hidden_size=32.*head_dim"),
    "key heads do not divide": (_changed(num_key_value_heads=3), "num_kv_heads=3.*num_heads=4"),
    "odd head": (_changed(head_dim=7), "head_dim=7.*even"),
    "text for a flag": (_changed(tie_word_embeddings="no"), "tie_word_embeddings='no'"),
    "text for an id": (_changed(eos_token_id="</s>"), "eos_token_id='</s>'.*whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(tmp_path, case):
    content, message = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_back(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(preset(name))))
    assert read_decoder_config(str(tmp_path)) == preset(name)
