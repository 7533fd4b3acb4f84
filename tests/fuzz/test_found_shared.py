"""Damaged files that were once too much for all loaders, or those of Hugging Face folders: now each is one line."""

import os

import pytest

import tasks
from sira_jax import json_text
from sira_jax.checkpoints import load_base_model, read_base_model
from sira_jax.checkpoints.safetensors import read_json
from sira_jax.errors import (
    LONGEST_MESSAGE,
    ConfigError,
    ModelFileError,
    SiraError,
    is_finite_number,
)
from sira_jax.files import open_binary
from tests.fuzz import model_files
from tests.fuzz.found import DEEP, MANY_DIGITS, assert_mistake_of_any_length, edit, made, pipe
from tests.integration.mistakes import assert_mistake


@pytest.fixture
def llama(tmp_path):
    return made(model_files.make_llama, tmp_path / "model")


# What all loaders share.


def test_a_message_is_one_printable_line_of_bounded_length():
    error = SiraError("a\nb\r\nc\0d\x1b[31m \ud800" + "x" * 100_000)
    message = str(error)
    assert message.startswith(r"a b c\x00d\x1b[31m \ud800xxx")
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE
    assert str(ConfigError("plain  text")) == "plain  text"


@pytest.mark.parametrize(
    "text", [DEEP, DEEP + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500, MANY_DIGITS, '"\\ud800"']
)
def test_json_that_python_reads_into_trouble(text, tmp_path):
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=r"nested|one another|digits|surrogates"):
            json_text.parse(form)
    (tmp_path / "x.json").write_text(text)
    assert_mistake(ModelFileError, lambda: read_json(str(tmp_path / "x.json")), tmp_path / "x.json")


def test_json_with_half_a_pair_of_surrogates_as_bytes():
    with pytest.raises(UnicodeDecodeError):
        json_text.parse(b'"\xed\xa0\x80"')
    assert json_text.parse(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert json_text.parse("\ufeff[1]".encode()) == [1]


def test_a_number_beyond_all_floats_is_no_number():
    for value in (10**400, 1e39, -1e39, float("nan"), float("inf"), True, "1", None):
        assert not is_finite_number(value)
    for value in (10**38, 3.4e38, -1, 0.0):
        assert is_finite_number(value)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_has(name, tmp_path):
    with pytest.raises(OSError, match="no file can have this name"):
        open_binary(tmp_path / name)


def endless(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [pipe, endless, os.mkdir])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_no_regular_file_in_a_model(put, name, llama):
    (llama / name).unlink()
    put(llama / name)
    if name == "tokenizer.json":
        assert str(llama / name) in load_base_model(llama).tokenizer_error
    else:
        assert_mistake(ModelFileError, lambda: load_base_model(llama), llama / name)


# Hugging Face folders.


def change_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b'"dtype":"F32"', b'"dtype":["F32"]', "unknown dtype"),
        (
            b'"shape":[8]',
            b'"shape":[' + b"9" * 4000 + b"," + b"9" * 4000 + b"]",
            "whole numbers under",
        ),
        (b'"model.norm.weight":', b'"model.norm.weight":1,"model.norm.weight":', "is there twice"),
        (b'"model.norm.weight":', b'"a\\nb":', "a b"),
        (b"{", b'{"deep":' + DEEP.encode(), "one another"),
    ],
)
def test_safetensors_header(old, new, named, llama):
    path = llama / "model.safetensors"
    change_header(path, lambda header: header.replace(old, new, 1))
    assert_mistake_of_any_length(ModelFileError, lambda: load_base_model(llama), llama, named)


@pytest.mark.parametrize(
    "shard", ["a\0b", "\ud800", "../outside/model.safetensors", "/etc/passwd", "..", ""]
)
def test_shards_elsewhere(shard, tmp_path):
    folder = made(model_files.make_sharded, tmp_path / "model")
    made(model_files.make_llama, tmp_path / "outside")
    edit(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": shard})
    assert_mistake(ModelFileError, lambda: load_base_model(folder), folder)


@pytest.mark.parametrize(
    "field", ["rms_norm_eps", "rope_theta", "hidden_size", "max_position_embeddings"]
)
def test_config_json_with_a_number_beyond_all_floats(field, llama):
    edit(llama / "config.json", **{field: 10**400})
    file = llama / "config.json"
    assert_mistake_of_any_length(ModelFileError, lambda: load_base_model(llama), file, field)


def test_a_token_id_that_is_a_deep_value(llama):
    edit(llama / "generation_config.json", pad_token_id=[["x" * 10_000]])
    assert_mistake_of_any_length(
        ModelFileError, lambda: load_base_model(llama), llama, "pad_token_id"
    )


@pytest.mark.parametrize(
    "added", [3, [3], [{"content": "<|im_start|>"}], [{"content": "<|im_start|>", "id": "x"}]]
)
def test_added_tokens_that_are_none(added, llama):
    (llama / "generation_config.json").unlink()
    edit(llama / "config.json", bos_token_id=None)
    edit(llama / "tokenizer.json", added_tokens=added)
    assert read_base_model(llama).special.bos_id is None


def test_an_added_token_beyond_the_embedding(llama):
    (llama / "generation_config.json").unlink()
    edit(llama / "config.json", bos_token_id=None)
    edit(llama / "tokenizer.json", added_tokens=[{"content": "<|im_start|>", "id": 10**6}])
    assert read_base_model(llama).special.bos_id is None


def test_chat_templates_by_names_that_are_none(llama):
    edit(
        llama / "tokenizer_config.json",
        chat_template=[{"name": [1]}, {"name": "default", "template": "x"}],
    )
    assert read_base_model(llama).chat_template == "x"


def test_a_chat_template_that_is_none_is_named_with_its_model(llama):
    edit(llama / "tokenizer_config.json", chat_template="{% endfor %}")
    model = read_base_model(llama)

    def make():
        tasks.make_template("chat", chat_template=model.chat_template, origin=model.source)

    assert_mistake(ConfigError, make, f"{llama}: chat_template, line 1")
