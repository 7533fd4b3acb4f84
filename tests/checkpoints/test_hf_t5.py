"""Hugging Face folders of the T5 family: config.json, tensors, what is written, what is refused."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sira_jax.checkpoints import (
    SpecialTokens,
    fingerprint,
    load_base_model,
    read_base_model,
    read_config,
    save_hf_folder,
)
from sira_jax.checkpoints.hf_models import write_model_config
from sira_jax.errors import ModelFileError
from sira_jax.models import EncoderDecoderConfig
from sira_jax.models.presets import preset
from tests.checkpoints.spiece import train
from tests.hf_models import assert_same_params, write_folder
from tests.hf_t5_models import TINY_T5, TINY_T5_1_1, TINY_T5S, t5_weights_by_rule

SPECIAL = SpecialTokens(eos_ids=(1,), pad_id=0)


def changed(base=TINY_T5_1_1, **changes):
    config = {**base, **changes}
    return {key: value for key, value in config.items() if value != "gone"}


def read(tmp_path, config, **options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path, **options)


def test_config_fields(tmp_path):
    config = changed(num_layers=6, n_positions=4096, relative_attention_max_distance=99)
    found, special = read(tmp_path, config, dtype="bfloat16", remat_policy="full")
    assert found == EncoderDecoderConfig(
        vocab_size=64,
        emb_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_dim=48,
        num_encoder_layers=6,
        num_decoder_layers=2,
        mlp_activations=("gelu", "linear"),
        tie_embeddings=False,
        norm_eps=1e-6,
        relpos_num_buckets=32,
        relpos_max_distance=99,
        max_positions=4096,
        dtype="bfloat16",
        remat_policy="full",
    )
    assert special == SPECIAL


ACCEPTED = {
    "t5 of old": (
        changed(
            TINY_T5,
            num_decoder_layers="gone",
            relative_attention_max_distance="gone",
            feed_forward_proj="gone",
            tie_word_embeddings="gone",
            decoder_start_token_id="gone",
            n_positions=512,
        ),
        {
            "num_decoder_layers": 2,
            "relpos_max_distance": 128,
            "mlp_activations": ("relu",),
            "tie_embeddings": True,
            "decoder_start_id": 0,
            "max_positions": 2048,
        },
    ),
    "t5 by transformers 5": (
        changed(tie_word_embeddings=True, scale_decoder_outputs=False),
        {"tie_embeddings": False},
    ),
    "mt5 by transformers 5": (
        changed(model_type="mt5", tie_word_embeddings=True, feed_forward_proj="gone"),
        {"tie_embeddings": False, "mlp_activations": ("gelu", "linear")},
    ),
    "umt5": (changed(model_type="umt5"), {"relpos_per_layer": True, "tie_embeddings": False}),
    "gated silu": (
        changed(feed_forward_proj="gated-silu", is_gated_act=True),
        {"mlp_activations": ("silu", "linear")},
    ),
    "another start": (changed(decoder_start_token_id=5), {"decoder_start_id": 5}),
}


@pytest.mark.parametrize(("config", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(tmp_path, config, expected):
    found, _ = read(tmp_path, config)
    assert {name: getattr(found, name) for name in expected} == expected


REFUSED = {
    "feed_forward_proj='gelu'": changed(feed_forward_proj="gelu"),
    "feed_forward_proj=3": changed(feed_forward_proj=3),
    "is_gated_act=False.*gated-gelu": changed(is_gated_act=False),
    "field d_kv is missing": changed(d_kv="gone"),
    "num_heads=0": changed(num_heads=0),
    "layer_norm_epsilon='small'": changed(layer_norm_epsilon="small"),
    "tie_word_embeddings='no'": changed(tie_word_embeddings="no"),
    "is_encoder_decoder=False": changed(is_encoder_decoder=False),
    "quantization_config": changed(quantization_config={}),
    "decoder_start_id=64.*vocab_size - 1 = 63": changed(decoder_start_token_id=64),
    "relpos_num_buckets=30": changed(relative_attention_num_buckets=30),
    "model_type='longt5' is not supported: one of llama, .*, t5, mt5, umt5": changed(
        model_type="longt5"
    ),
}


@pytest.mark.parametrize(("message", "config"), REFUSED.items(), ids=REFUSED)
def test_refused(tmp_path, message, config):
    with pytest.raises(ModelFileError, match=rf"config.json: .*{message}"):
        read(tmp_path, config)


@pytest.mark.parametrize("name", ["t5-1.0-3b", "t5-1.1-xl", "mt5-small", "byt5-large"])
def test_presets_come_back_from_what_is_written(tmp_path, name):
    for config in (preset(name), preset(name, relpos_per_layer=True)):
        assert read(tmp_path, write_model_config(config))[0] == config


def test_activations_without_a_name_are_not_written():
    config = preset("t5-tiny", mlp_activations=("linear", "linear"))
    with pytest.raises(ModelFileError, match=r"mlp_activations=.* cannot be written"):
        write_model_config(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("t5")
    return {
        name: write_folder(root / name, config, t5_weights_by_rule(config))
        for name, config in TINY_T5S.items()
    }


@pytest.mark.parametrize("name", TINY_T5S)
def test_tensors_are_where_they_belong(folders, name):
    weights = t5_weights_by_rule(TINY_T5S[name])
    params = load_base_model(folders[name]).params
    prefix = "decoder.block.0.layer.1."
    cross = params["decoder"]["layers"]["encoder_decoder_attention"]
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        expected = weights[f"{prefix}EncDecAttention.{theirs}.weight"].T
        np.testing.assert_array_equal(cross[ours]["kernel"][0], expected)
    last = TINY_T5S[name]["num_layers"] - 1
    mlp = params["encoder"]["layers"]["mlp"]
    expected = weights[f"encoder.block.{last}.layer.1.DenseReluDense.wo.weight"].T
    np.testing.assert_array_equal(mlp["wo"]["kernel"][last], expected)
    table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    stack = params["decoder"]
    found = stack["layers"] if name == "umt5" else stack
    found = found["relpos_bias"]["rel_embedding"]
    np.testing.assert_array_equal(found[0] if name == "umt5" else found, weights[table].T)


@pytest.mark.parametrize("name", ["t5-1.0", "umt5"])
def test_what_is_written_is_read_back_from_shards_in_either_layout(tmp_path, folders, name):
    model = load_base_model(folders[name])
    save_hf_folder(tmp_path, model.config, model.params, special=SPECIAL, max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = load_base_model(tmp_path, scan_layers=False)
    assert again.special == SPECIAL
    assert fingerprint(again.params) == fingerprint(model.params)
    scanned = load_base_model(tmp_path)
    assert scanned.config == model.config
    assert_same_params(scanned.params, model.params)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == 0


def test_fingerprints_tell_stacks_and_layers_apart(folders):
    params = load_base_model(folders["t5-1.1"], scan_layers=False).params
    name = fingerprint(params)
    other = dict(params["encoder"])
    other["layers_0"], other["layers_1"] = other["layers_1"], other["layers_0"]
    assert fingerprint(params | {"encoder": other}) != name
    swapped = {"encoder": params["decoder"], "decoder": params["encoder"]}
    assert fingerprint(params | swapped) != name


def test_copies_and_unused_tables_are_passed_over(tmp_path):
    weights = t5_weights_by_rule(TINY_T5)
    expected = load_base_model(write_folder(tmp_path / "a", TINY_T5, weights)).params
    shared = weights["shared.weight"]
    more = {f"{stack}.embed_tokens.weight": shared.copy() for stack in ("encoder", "decoder")}
    more["lm_head.weight"] = shared.copy()
    table = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more[table] = np.ones((32, 4), np.float32)
    found = load_base_model(write_folder(tmp_path / "b", TINY_T5, weights | more)).params
    assert_same_params(found, expected)
    del weights["shared.weight"]
    only = weights | {"decoder.embed_tokens.weight": shared}
    assert_same_params(
        load_base_model(write_folder(tmp_path / "c", TINY_T5, only)).params, expected
    )


def test_untied_logits_without_a_matrix_have_the_embeddings(tmp_path):
    """What transformers 5 writes of a model that ties the two without scaling."""
    config = {**TINY_T5_1_1, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    weights = t5_weights_by_rule(config)
    assert "lm_head.weight" not in weights
    params = load_base_model(write_folder(tmp_path, config, weights)).params
    head = params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(head, params["token_embedder"]["embedding"].T)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    weights = t5_weights_by_rule(TINY_T5_1_1)
    name = "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"
    del weights[name]
    weights["decoder.final_layer_norm.weight"] = np.ones(31, np.float32)
    weights["encoder.block.2.layer.0.layer_norm.weight"] = np.ones(32, np.float32)
    folder = write_folder(tmp_path, TINY_T5_1_1, weights)
    with pytest.raises(ModelFileError) as caught:
        load_base_model(folder)
    assert str(caught.value) == (
        f"{folder}: missing tensors: {name}; unexpected tensors: encoder.block.2.layer.0.layer_norm.weight; "
        "tensors of another shape: decoder.final_layer_norm.weight is (31,), expected (32,)"
    )


def test_absurd_counts_are_not_listed(tmp_path):
    config = {**TINY_T5_1_1, "num_decoder_layers": 10**9}
    folder = write_folder(tmp_path, config, t5_weights_by_rule(TINY_T5_1_1))
    with pytest.raises(ModelFileError, match="cannot make 1000000002 layers"):
        load_base_model(folder)


def test_leaves_are_sharded_as_they_are_read(folders):
    plain = load_base_model(folders["mt5"]).params
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())
    model = load_base_model(folders["mt5"], sharding_fn=lambda path, shape: sharding)
    assert all(x.sharding == sharding for x in jax.tree.leaves(model.params))
    assert_same_params(model.params, plain)


def test_tokenizers_of_a_folder(tmp_path):
    config = {**TINY_T5_1_1, "vocab_size": 384, "eos_token_id": None, "pad_token_id": None}
    folder = write_folder(tmp_path, config, t5_weights_by_rule(config))
    model = read_base_model(folder)
    assert model.special == SPECIAL  # T5's own where no file names them
    with pytest.raises(ModelFileError, match=r"tokenizer.json: no such file"):
        model.tokenizer()
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert read_base_model(folder).tokenizer().encode("hi").ids == [107, 108, 1]
    (folder / "spiece.model").write_bytes(train())
    settings.write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 7}))
    tokenizer = read_base_model(folder).tokenizer()
    assert tokenizer.token_to_id("<extra_id_6>") is not None
    assert tokenizer.token_to_id("<extra_id_7>") is None
    settings.write_text(json.dumps({"extra_ids": -1}))
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json: extra_ids=-1"):
        read_base_model(folder).tokenizer()
