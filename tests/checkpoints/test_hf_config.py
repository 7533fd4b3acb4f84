"""config.json of Hugging Face folders: what is read and what is refused."""

import json

import pytest

from sira_jax.checkpoints import read_config
from sira_jax.checkpoints.hf_config import read_decoder_config, to_hf_config
from sira_jax.checkpoints.hf_families import shortest_pattern
from sira_jax.errors import ModelFileError
from sira_jax.models.config import DecoderConfig
from sira_jax.models.presets import PRESETS, preset
from sira_jax.models.rope import LinearRopeScaling, RopeScaling
from tests.hf_models import (
    LLAMA3_ROPE,
    TINY_GEMMA2,
    TINY_GEMMA3,
    TINY_LLAMA,
    TINY_QWEN2,
    TINY_QWEN3,
)


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


GEMMA_FIELDS = {
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "sandwich_norms": True,
    "scale_embeddings": True,
}


def test_fields_of_gemma(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_GEMMA2))
    two, _ = read_config(tmp_path)
    sizes = {
        "vocab_size": 96,
        "emb_dim": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "mlp_dim": 48,
        "norm_eps": 1e-6,
        "max_positions": 128,
        **GEMMA_FIELDS,
    }
    assert two == DecoderConfig(
        **sizes,
        query_pre_attn_scalar=20.0,
        attention_softcap=2.0,
        final_softcap=3.0,
        sliding_window=7,
        window_pattern=(True, False),
    )
    scaled = {"rope_type": "linear", "factor": 8.0}
    (tmp_path / "config.json").write_text(json.dumps({**TINY_GEMMA3, "rope_scaling": scaled}))
    three, _ = read_config(tmp_path)
    assert three == DecoderConfig(
        **sizes,
        qk_norm=True,
        query_pre_attn_scalar=20.0,
        sliding_window=5,
        window_pattern=(True, False),
        rope_theta=1e6,
        rope_scaling=LinearRopeScaling(factor=8.0),
        local_rope_theta=100.0,
    )


def test_silent_configs_are_filled_as_transformers_does(tmp_path):
    """The published gemma-3-4b config.json says no more of its language model than this."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    content = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, special = read_config(tmp_path)
    assert config == preset("gemma-3-4b")
    assert special.eos_ids == (1, 106)
    silent = {"model_type": "gemma2", "num_hidden_layers": 26}
    (tmp_path / "config.json").write_text(json.dumps(silent))
    assert read_config(tmp_path)[0] == preset("gemma-2-2b")


def _changed(_base: dict = TINY_LLAMA, **changes: object) -> dict:
    config = {**_base, **changes}
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
    "linear": (
        _changed(rope_parameters={"rope_type": "linear", "factor": 2.0}),
        {"rope_scaling": LinearRopeScaling(factor=2.0)},
    ),
    "mistral with a window": (
        _changed(model_type="mistral", sliding_window=64),
        {"sliding_window": 64, "window_pattern": (True,)},
    ),
    "mistral default window": (
        _changed(model_type="mistral", max_position_embeddings=8192),
        {"sliding_window": 4096},
    ),
    "qwen2 with a window in later layers": (
        {**TINY_QWEN2, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 32, "window_pattern": (False, True, True)},
    ),
    "qwen2 with a window in all layers": (
        {**TINY_QWEN2, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 32, "window_pattern": (True,)},
    ),
    "qwen2 with a window in no layer": (
        {**TINY_QWEN2, "use_sliding_window": True},
        {"sliding_window": None},
    ),
    "qwen2 that names layers without its flag": (
        {**TINY_QWEN2, "layer_types": ["sliding_attention"] * 3},
        {"sliding_window": None},
    ),
    "qwen3": (
        TINY_QWEN3,
        {"qk_norm": True, "qkv_bias": False, "head_dim": 12, "sliding_window": None},
    ),
    "qwen3 without a head's width": (_changed(TINY_QWEN3, head_dim="gone"), {"head_dim": 128}),
    "layer types over the pattern": (
        _changed(
            TINY_GEMMA2,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
        {"window_pattern": (False, True, True), "sliding_window": 7},
    ),
    "gemma2 without a window": (
        _changed(TINY_GEMMA2, sliding_window=None),
        {"sliding_window": None},
    ),
    "gemma2 without caps": (
        _changed(TINY_GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None),
        {"attention_softcap": None, "final_softcap": None},
    ),
    "gemma2 with the default caps": (
        _changed(TINY_GEMMA2, attn_logit_softcapping="gone", final_logit_softcapping="gone"),
        {"attention_softcap": 50.0, "final_softcap": 30.0},
    ),
    "gemma2 scaled by the head's width": (
        _changed(TINY_GEMMA2, query_pre_attn_scalar=12),
        {"query_pre_attn_scalar": None},
    ),
    "gemma3 with a final cap": (
        _changed(TINY_GEMMA3, final_logit_softcapping=9.0),
        {"final_softcap": 9.0, "attention_softcap": None},
    ),
    "gemma3, the default pattern and base": (
        _changed(
            TINY_GEMMA3,
            sliding_window_pattern="gone",
            rope_local_base_freq="gone",
            num_hidden_layers=7,
        ),
        {"window_pattern": (True,) * 5 + (False,), "local_rope_theta": 10000.0},
    ),
    "gemma3, window over all positions": (
        _changed(TINY_GEMMA3, sliding_window=4096),
        {"sliding_window": 4096, "local_rope_theta": 100.0},
    ),
    "gemma3 without a window": (
        _changed(TINY_GEMMA3, sliding_window=None),
        {"sliding_window": None, "local_rope_theta": None},
    ),
    "gemma3, rope by layer": (
        _changed(
            TINY_GEMMA3,
            rope_theta="gone",
            rope_local_base_freq="gone",
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        ),
        {
            "rope_theta": 5e5,
            "local_rope_theta": 300.0,
            "rope_scaling": LinearRopeScaling(factor=8.0),
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
    "mistral window": (_changed(model_type="mistral", sliding_window=0), "sliding_window=0"),
    "mistral with layers of two kinds": (
        _changed(
            model_type="mistral",
            sliding_window=64,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        "layer_types=.*sliding_attention alone",
    ),
    "llama with a windowed layer": (
        _changed(layer_types=["sliding_attention"] * 3),
        "layer_types=.*full_attention alone",
    ),
    "layer types too few": (
        _changed(TINY_GEMMA2, layer_types=["full_attention"]),
        "layer_types=.*each of 3 layers",
    ),
    "other layer types": (
        _changed(TINY_GEMMA2, layer_types=["chunked_attention"] * 3),
        "layer_types=.*full_attention and sliding_attention",
    ),
    "absurd number of windowed layers": (
        _changed(TINY_GEMMA2, num_hidden_layers=10**9),
        "num_hidden_layers=1000000000 .*at most 1000",
    ),
    "negative max_window_layers": (
        {**TINY_QWEN2, "use_sliding_window": True, "max_window_layers": -1},
        "max_window_layers=-1",
    ),
    "gemma3 with a cap on attention": (
        _changed(TINY_GEMMA3, attn_logit_softcapping=50.0),
        "attn_logit_softcapping=50.0.*null",
    ),
    "gemma2 with a negative cap": (
        _changed(TINY_GEMMA2, final_logit_softcapping=-1.0),
        "final_logit_softcapping=-1.0",
    ),
    "gemma2, other activation": (
        _changed(TINY_GEMMA2, hidden_activation="gelu"),
        "hidden_activation='gelu'.*gelu_pytorch_tanh",
    ),
    "gemma3 that looks both ways": (
        _changed(TINY_GEMMA3, use_bidirectional_attention=True),
        "use_bidirectional_attention=True",
    ),
    "gemma3, windowed layers scaled": (
        _changed(
            TINY_GEMMA3,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            },
        ),
        "rope_parameters.sliding_attention.rope_type='linear'.*default",
    ),
    "gemma3, rope of a third kind of layer": (
        _changed(TINY_GEMMA3, rope_parameters={"full_attention": {"x": {}}}),
        "rope_parameters=.*one object",
    ),
    "qwen3 with biases": (_changed(TINY_QWEN3, attention_bias=True), "attention_bias=True"),
    "no text_config": ({"model_type": "gemma3"}, "text_config=None.*an object"),
    "wrong field of text_config": (
        {"model_type": "gemma3", "text_config": {**TINY_GEMMA3, "hidden_size": 0}},
        "text_config.hidden_size=0",
    ),
    "mistral key heads not given": (
        _changed(model_type="mistral", num_key_value_heads="gone"),
        "num_key_value_heads is missing",
    ),
    "attention_bias": (_changed(attention_bias=True), "attention_bias=True"),
    "mlp_bias": (_changed(mlp_bias=True), "mlp_bias=True"),
    "other activation": (_changed(hidden_act="gelu"), "hidden_act='gelu'.*silu"),
    "yarn": (_changed(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_type='yarn'.*llama3"),
    "linear by less than 1": (
        _changed(rope_parameters={"rope_type": "linear", "factor": 0.5}),
        "rope_scaling.factor=0.5",
    ),
    "linear without factor": (
        _changed(rope_parameters={"rope_type": "linear"}),
        "rope_parameters.factor is missing",
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


@pytest.mark.parametrize(
    "config",
    [
        _changed(model_type="mistral", sliding_window=64, architectures=["MistralForCausalLM"]),
        {**TINY_QWEN2, "use_sliding_window": True, "max_window_layers": 1},
        _changed(TINY_QWEN3, use_sliding_window=True, sliding_window=9, max_window_layers=2),
        TINY_GEMMA2,
        _changed(TINY_GEMMA2, sliding_window=None, query_pre_attn_scalar=12),
        _changed(TINY_GEMMA2, attn_logit_softcapping=None),
        TINY_GEMMA3,
        _changed(TINY_GEMMA3, sliding_window=None, final_logit_softcapping=9.0),
        _changed(TINY_GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        _changed(rope_scaling={"rope_type": "linear", "factor": 8.0}),
    ],
    ids=lambda config: config["model_type"],
)
def test_the_family_is_written_back(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = read_decoder_config(str(tmp_path))
    written = to_hf_config(first)
    assert written["model_type"] == config["model_type"]
    assert written["architectures"] == config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_decoder_config(str(tmp_path)) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_plus_one": True},
        {"qkv_bias": True, "qk_norm": True},
        {"final_softcap": 3.0},
        {"sliding_window": 4, "window_pattern": (True, False), "local_rope_theta": 10.0},
        {"sliding_window": 4, "window_pattern": (True, False)},
    ],
)
def test_what_no_family_is_like_is_not_written(changes):
    with pytest.raises(ModelFileError, match=r"no model_type of config\.json.*llama, mistral"):
        to_hf_config(preset("tiny", **changes))


@pytest.mark.parametrize(
    ("windowed", "pattern"),
    [
        ((True, False, True, False, True), (True, False)),
        ((False, False), (False,)),
        ((True,), (True,)),
        ((False, True, True), (False, True, True)),
        ((True, True, False) * 3 + (True,), (True, True, False)),
        ((True, True, False, True, False), (True, True, False, True, False)),
    ],
)
def test_shortest_pattern(windowed, pattern):
    assert shortest_pattern(windowed) == pattern
