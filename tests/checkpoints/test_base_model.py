"""Hugging Face folders: what is loaded, what is refused, and what is written."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sira_jax.checkpoints import (
    BaseModel,
    SpecialTokens,
    load_base_model,
    read_base_model,
    read_config,
    save_hf_folder,
)
from sira_jax.checkpoints.layout import flatten
from sira_jax.errors import ModelFileError
from tests.hf_models import (
    FAMILIES,
    LLAMA3_ROPE,
    TINY_GEMMA3,
    TINY_LLAMA,
    TINY_QWEN2,
    assert_same_params,
    stacked,
    weights_by_rule,
    write_folder,
)

WORD_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, content in ((0, "<pad>"), (1, "<s>"), (2, "</s>"))
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {
        "type": "WordLevel",
        "vocab": {"<pad>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4},
        "unk_token": "<pad>",
    },
}


def load(path, **options) -> BaseModel:
    return load_base_model(path, **options)


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_QWEN2], ids=["llama", "qwen2"])
def test_every_tensor_arrives_in_its_place(tmp_path, config):
    weights = weights_by_rule(config)
    model = load(write_folder(tmp_path, config, weights))
    expected = {
        "token_embedder": {"embedding": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
        "layers": {
            "input_norm": {"scale": stacked(weights, "input_layernorm.weight")},
            "mlp_norm": {"scale": stacked(weights, "post_attention_layernorm.weight")},
            "attention": {
                name: {"kernel": stacked(weights, f"self_attn.{name}_proj.weight")}
                for name in "qkvo"
            },
            "mlp": {
                name: {"kernel": stacked(weights, f"mlp.{name}_proj.weight")}
                for name in ("gate", "up", "down")
            },
        },
    }
    if config is TINY_QWEN2:
        for name in "qkv":
            bias = stacked(weights, f"self_attn.{name}_proj.bias")
            expected["layers"]["attention"][name]["bias"] = bias
    else:
        expected["lm_head"] = {"kernel": weights["lm_head.weight"].T}
    assert_same_params(model.params, expected)
    assert model.source == str(tmp_path)


def test_layers_apart_hold_the_same(tmp_path):
    weights = weights_by_rule(TINY_LLAMA)
    path = write_folder(tmp_path, TINY_LLAMA, weights)
    params = load(path, scan_layers=False).params
    assert {f"layers_{layer}" for layer in range(3)} < params.keys()
    whole = load(path).params["layers"]
    for layer in range(3):
        for key, leaf in flatten(whole).items():
            part = flatten(params[f"layers_{layer}"])[key]
            np.testing.assert_array_equal(np.asarray(part), np.asarray(leaf)[layer])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
def test_types_are_converted(tmp_path, stored, held):
    weights = {name: array.astype(stored) for name, array in weights_by_rule(TINY_LLAMA).items()}
    model = load(write_folder(tmp_path, TINY_LLAMA, weights), param_dtype=held)
    assert {leaf.dtype for leaf in flatten(model.params).values()} == {jnp.dtype(held)}
    found = np.asarray(model.params["layers"]["mlp"]["down"]["kernel"])
    expected = stacked(weights, "mlp.down_proj.weight").astype(jnp.dtype(held))
    np.testing.assert_array_equal(found, expected)


def test_shards_and_small_chunks_give_the_same(tmp_path, monkeypatch):
    weights = weights_by_rule(TINY_LLAMA)
    whole = load(write_folder(tmp_path / "one", TINY_LLAMA, weights))
    monkeypatch.setattr("sira_jax.checkpoints.safetensors._CHUNK_BYTES", 512)
    sharded = load(write_folder(tmp_path / "many", TINY_LLAMA, weights, num_shards=4))
    assert_same_params(sharded.params, whole.params)


def test_known_extras_are_passed_over(tmp_path):
    config = {**TINY_LLAMA, "tie_word_embeddings": True}
    weights = weights_by_rule(config)
    plain = load(write_folder(tmp_path / "plain", config, weights))
    weights["lm_head.weight"] = np.zeros_like(weights["model.embed_tokens.weight"])
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    found = load(write_folder(tmp_path / "extras", config, weights))
    assert "lm_head" not in found.params
    assert_same_params(found.params, plain.params)


def test_special_tokens_come_from_the_generation_config_first(tmp_path):
    write_folder(tmp_path, TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    assert read_config(tmp_path)[1] == SpecialTokens(bos_id=1, eos_ids=(2,), pad_id=None)
    generation = {"eos_token_id": [5, 7, 5], "pad_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path)[1] == SpecialTokens(bos_id=1, eos_ids=(5, 7), pad_id=3)


def test_special_tokens_by_the_tokenizer_s_names(tmp_path):
    config = {**TINY_LLAMA, "eos_token_id": None, "pad_token_id": -1}
    del config["bos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORD_TOKENIZER))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert read_config(tmp_path)[1] == SpecialTokens(bos_id=1, eos_ids=(2,), pad_id=0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": '{"chat_template": "A"}'}, "A"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "tool_use", "template": "T"},
                            {"name": "default", "template": "D"},
                        ]
                    }
                )
            },
            "D",
        ),
        ({"tokenizer_config.json": '{"chat_template": "A"}', "chat_template.jinja": "J"}, "J"),
    ],
)
def test_chat_template(tmp_path, files, expected):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_base_model(tmp_path).chat_template == expected


def test_tokenizer_is_an_error_only_when_asked_for(tmp_path):
    path = write_folder(tmp_path, TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    model = load(path)
    assert model.tokenizer_json is None
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: no such file"):
        model.tokenizer()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: not valid JSON"):
        load(path).tokenizer()
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelFileError, match="not a tokenizer"):
        load(path).tokenizer()
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORD_TOKENIZER))
    assert load(path).tokenizer().encode("hello world").ids == [3, 4]


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("most", [10**9, 20_000], ids=["one file", "shards"])
def test_written_folder_is_read_back(tmp_path, config, scan_layers, most):
    config = {**config, "rope_scaling": LLAMA3_ROPE, "head_dim": 12}
    weights = weights_by_rule(config)
    model = load(write_folder(tmp_path / "a", config, weights), scan_layers=scan_layers)
    special = SpecialTokens(bos_id=1, eos_ids=(2, 4), pad_id=0)
    text = json.dumps(WORD_TOKENIZER)
    save_hf_folder(
        tmp_path / "b",
        model.config,
        model.params,
        text,
        special,
        chat_template="hi",
        max_shard_bytes=most,
    )
    written = {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        written |= load_file(file)
    assert (tmp_path / "b" / "model.safetensors").exists() == (most == 10**9)
    assert written.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(written[name], array)
    again = load(tmp_path / "b", scan_layers=scan_layers)
    assert again.config == model.config
    assert (again.special, again.tokenizer_json, again.chat_template) == (special, text, "hi")
    assert_same_params(again.params, model.params)
    names = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert (names["bos_token"], names["eos_token"], names["pad_token"]) == ("<s>", "</s>", "<pad>")


def test_what_no_family_is_like_is_refused_before_anything_is_written(tmp_path):
    model = load(write_folder(tmp_path / "a", TINY_LLAMA, weights_by_rule(TINY_LLAMA)))
    config = dataclasses.replace(model.config, scale_embeddings=True)
    with pytest.raises(ModelFileError, match="no model_type"):
        save_hf_folder(tmp_path / "b", config, model.params)
    assert not (tmp_path / "b").exists()


OLDER = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
NEWER = {"model.": "model.language_model.", "lm_head.": "lm_head."}


@pytest.mark.parametrize("prefixes", [OLDER, NEWER], ids=["older", "newer"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_of_one_that_reads_images(tmp_path, prefixes, tied):
    text = {**TINY_GEMMA3, "tie_word_embeddings": tied}
    weights = weights_by_rule(text)
    expected = load(write_folder(tmp_path / "a", text, weights))
    renamed = {
        new + name.removeprefix(old): array
        for name, array in weights.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }
    where = "model." if prefixes is NEWER else ""
    renamed[f"{where}vision_tower.encoder.q_proj.weight"] = np.zeros((2, 2), np.float32)
    renamed[f"{where}multi_modal_projector.norm.weight"] = np.zeros(2, np.float32)
    whole = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 5]}
    found = load(write_folder(tmp_path / "b", whole, renamed))
    assert found.config == expected.config
    assert found.special.eos_ids == (1, 5)
    assert_same_params(found.params, expected.params)
    del renamed[prefixes["model."] + "layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelFileError, match=r"missing tensors: model\.layers\.1\.mlp\.up_proj"):
        load(write_folder(tmp_path / "b", whole, renamed))


def test_writing_over_a_sharded_model_leaves_one_model(tmp_path):
    model = load(write_folder(tmp_path / "a", TINY_LLAMA, weights_by_rule(TINY_LLAMA)))
    save_hf_folder(tmp_path / "b", model.config, model.params, max_shard_bytes=20_000)
    changed = {**model.params, "final_norm": {"scale": jnp.full(32, 2.0)}}
    save_hf_folder(tmp_path / "b", model.config, changed)
    assert_same_params(load(tmp_path / "b").params, changed)
    save_hf_folder(tmp_path / "b", model.config, model.params, max_shard_bytes=20_000)
    assert_same_params(load(tmp_path / "b").params, model.params)


def test_written_weights_keep_their_type(tmp_path):
    path = write_folder(tmp_path / "a", TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    model = load(path, param_dtype="bfloat16")
    save_hf_folder(tmp_path / "b", model.config, model.params)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load(tmp_path / "b", param_dtype="bfloat16")
    assert_same_params(again.params, model.params)


def test_adapters_must_be_merged_before_writing(tmp_path):
    model = load(write_folder(tmp_path / "a", TINY_LLAMA, weights_by_rule(TINY_LLAMA)))
    q = {**model.params["layers"]["attention"]["q"], "adapter": {"lora_a": jnp.zeros((3, 32, 4))}}
    attention = {**model.params["layers"]["attention"], "q": q}
    params = {**model.params, "layers": {**model.params["layers"], "attention": attention}}
    with pytest.raises(ModelFileError, match=r"layers/attention/q/adapter/lora_a \(merge adapters"):
        save_hf_folder(tmp_path / "b", model.config, params)
    params = {**model.params, "final_norm": {"scale": jnp.zeros(7)}}
    with pytest.raises(ModelFileError, match=r"final_norm/scale is \(7,\), expected \(32,\)"):
        save_hf_folder(tmp_path / "b", model.config, params)
    del params["final_norm"]
    with pytest.raises(ModelFileError, match="missing final_norm/scale"):
        save_hf_folder(tmp_path / "b", model.config, params)
    assert not (tmp_path / "b").exists()


def _weights(**changes: object) -> dict:
    weights = {**weights_by_rule(TINY_LLAMA), **changes}
    return {name: array for name, array in weights.items() if array is not None}


Q1 = "model.layers.1.self_attn.q_proj.weight"
MISFITS = {
    "missing": ({Q1: None}, f"missing tensors: {Q1}"),
    "missing head": ({"lm_head.weight": None}, "missing tensors: lm_head.weight"),
    "unexpected": ({"score.weight": np.zeros(3)}, "unexpected tensors: score.weight"),
    "one layer too many": (
        {"model.layers.3.mlp.up_proj.weight": np.zeros((48, 32), np.float32)},
        "unexpected tensors: model.layers.3.mlp.up_proj.weight",
    ),
    "transposed": (
        {"model.layers.2.mlp.down_proj.weight": np.zeros((48, 32), np.float32)},
        r"model.layers.2.mlp.down_proj.weight is \(48, 32\), expected \(32, 48\)",
    ),
    "wrong rank": (
        {"model.norm.weight": np.zeros((1, 32), np.float32)},
        r"model.norm.weight is \(1, 32\), expected \(32,\)",
    ),
    "all at once": (
        {Q1: None, "score": np.zeros(1), "model.norm.weight": np.zeros(3)},
        f"missing tensors: {Q1}; unexpected tensors: score; .*another shape: model.norm.weight",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit(tmp_path, case):
    changes, message = MISFITS[case]
    path = write_folder(tmp_path, TINY_LLAMA, _weights(**changes))
    with pytest.raises(ModelFileError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_head_beside_tied_embeddings_must_fit(tmp_path):
    config = {**TINY_LLAMA, "tie_word_embeddings": True}
    weights = {**weights_by_rule(config), "lm_head.weight": np.zeros((95, 32), np.float32)}
    with pytest.raises(ModelFileError, match=r"lm_head.weight is \(95, 32\), expected \(96, 32\)"):
        load(write_folder(tmp_path, config, weights))


def test_long_lists_of_tensors_are_cut(tmp_path):
    write_folder(tmp_path, {**TINY_LLAMA, "num_hidden_layers": 9}, weights_by_rule(TINY_LLAMA))
    with pytest.raises(ModelFileError, match="and 46 more"):
        load(tmp_path)


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFileError, match=r"config\.json: cannot be opened \(Is a directory\)"):
        load(tmp_path)


def test_an_absurd_number_of_layers_is_refused_at_once(tmp_path):
    config = {**TINY_LLAMA, "num_hidden_layers": 10**9}
    write_folder(tmp_path, config, weights_by_rule(TINY_LLAMA))
    with pytest.raises(ModelFileError, match="30 tensors cannot make 1000000000 layers"):
        load(tmp_path)


def test_folders_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor .*index\.json"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02never read")
    with pytest.raises(ModelFileError, match=r"only in pytorch_model\.bin, a pickle.*safetensors"):
        load(tmp_path)


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(ModelFileError, match=r"nowhere: no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match=r"config\.json: no such file"):
        load(tmp_path)
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="neither a GGUF file nor a folder"):
        load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{'single': 'quotes'}")
    with pytest.raises(ModelFileError, match=r"config\.json: not valid JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelFileError, match="JSON object, found list"):
        load(tmp_path)


def test_bad_indices(tmp_path):
    weights = weights_by_rule(TINY_LLAMA)
    path = write_folder(tmp_path, TINY_LLAMA, weights, num_shards=2)
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())

    def load_with(weight_map):
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        return load(path)

    with pytest.raises(ModelFileError, match="weight_map is missing or empty"):
        load_with({})
    with pytest.raises(
        ModelFileError, match=r"'\.\./evil\.safetensors' must be the name of a file"
    ):
        load_with({**index["weight_map"], Q1: "../evil.safetensors"})
    with pytest.raises(ModelFileError, match=r"model-00003-of-00002\.safetensors: no such file"):
        load_with({**index["weight_map"], Q1: "model-00003-of-00002.safetensors"})
    swapped = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    other = (swapped - {index["weight_map"][Q1]}).pop()
    with pytest.raises(ModelFileError, match=rf"{other}: missing tensor {Q1}"):
        load_with({**index["weight_map"], Q1: other})
    save_file(weights, path / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelFileError, match=r"tensor .* is in model-0000\d.* and in model-0000\d"):
        load_with(index["weight_map"])


def test_truncated_shard(tmp_path):
    path = write_folder(tmp_path, TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="truncated: tensor"):
        load(path)
