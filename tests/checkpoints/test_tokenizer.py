"""Tokenizers built from GGUF metadata."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.checkpoints import SpecialTokens, read_base_model
from sira_jax.checkpoints.tokenizer import (
    added_token_id,
    parse_tokenizer,
    special_tokens_from_gguf,
    tokenizer_from_gguf,
)
from sira_jax.errors import ModelFileError
from tests.gguf_models import tokenizer_fields, write_gguf
from tests.hf_models import TINY_LLAMA, weights_by_rule


def build(pre: str, **changes: object):
    return parse_tokenizer(
        "a.gguf", tokenizer_from_gguf("a.gguf", tokenizer_fields(pre, **changes))
    )


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "hello world", ["hello", "Ġwor", "l", "d"]),
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("qwen2", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "a 123", ["<|im_start|>", "a", "Ġ", "123"]),
        ("llama-bpe", "1234", ["<|im_start|>", "123", "4"]),
        ("smollm", "hello<|im_end|>hello", ["hello", "<|im_end|>", "hello"]),
        ("qwen2", "é", ["Ã", "©"]),
    ],
)
def test_splits_as_the_model_was_trained(pre, text, tokens):
    assert build(pre).encode(text).tokens == tokens


def test_bos_is_added_where_the_file_says_so():
    on, off = {"tokenizer.ggml.add_bos_token": True}, {"tokenizer.ggml.add_bos_token": False}
    assert build("smollm", **on).encode("hello").tokens == ["<|im_start|>", "hello"]
    assert build("llama-bpe", **off).encode("hello").tokens == ["hello"]
    assert build("llama-bpe").encode("hello", add_special_tokens=False).tokens == ["hello"]
    pair = build("llama-bpe").encode("hello", "hello").tokens
    assert pair == ["<|im_start|>", "hello"] * 2


def test_control_tokens_are_special_and_user_defined_ones_are_not():
    tokenizer = build("smollm")
    ids = tokenizer.encode("<tool>hello<|im_end|>").ids
    assert tokenizer.decode(ids) == "<tool>hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<tool>hello<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_any_text_comes_back(pre, text):
    tokenizer = _tokenizers(pre)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


_BUILT: dict = {}


def _tokenizers(pre: str):
    return _BUILT.setdefault(pre, build(pre))


def test_ids_are_the_places_in_the_file():
    tokenizer = build("qwen2")
    for index, token in enumerate(tokenizer_fields("qwen2")["tokenizer.ggml.tokens"]):
        assert tokenizer.token_to_id(token) == index


def test_special_ids():
    fields = tokenizer_fields("qwen2", **{"tokenizer.ggml.eot_token_id": 4})
    assert special_tokens_from_gguf(fields, 270) == SpecialTokens(1, (2, 4), 0)
    fields = tokenizer_fields("qwen2", **{"tokenizer.ggml.eot_token_id": 2})
    assert special_tokens_from_gguf(fields, 270).eos_ids == (2,)
    assert special_tokens_from_gguf({}, 270) == SpecialTokens(None, (), None)
    outside = {"tokenizer.ggml.bos_token_id": 270}
    assert special_tokens_from_gguf(outside, 270).bos_id is None


def test_added_token_id():
    text = tokenizer_from_gguf("a.gguf", tokenizer_fields("smollm"))
    assert added_token_id(text, "<|im_end|>") == 2
    assert added_token_id(text, {"content": "<|im_start|>"}) == 1
    assert added_token_id(text, "hello") is None
    assert added_token_id(None, "<|im_end|>") is None
    assert added_token_id(text, None) is None


TOKENS = tokenizer_fields("smollm")["tokenizer.ggml.tokens"]
BAD = {
    "other model": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert'.*gpt2 or llama"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing or no list"),
    "other split": (
        {"tokenizer.ggml.pre": "tekken"},
        "tokenizer.ggml.pre='tekken'.*smollm, qwen2, llama-bpe",
    ),
    "no model": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing or no str"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing or no list"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    "types too few": ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type 2"),
    "a token twice": (
        {"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]},
        "tokenizer.ggml.tokens has .* different",
    ),
    "merge of unknown tokens": ({"tokenizer.ggml.merges": ["q q"]}, "merges holds 'q q'"),
    "merge of one token": ({"tokenizer.ggml.merges": ["q"]}, "merges holds 'q'"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_tokenizers_are_refused(case):
    changes, message = BAD[case]
    with pytest.raises(ModelFileError, match=message) as caught:
        build("smollm", **changes)
    assert "a.gguf" in str(caught.value)


def test_the_model_loads_without_its_tokenizer(tmp_path):
    fields = {
        **tokenizer_fields("tekken"),
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.padding_token_id": 5,
    }
    write_gguf(tmp_path / "a.gguf", TINY_LLAMA, weights_by_rule(TINY_LLAMA), metadata=fields)
    model = read_base_model(tmp_path / "a.gguf")
    assert model.tokenizer_json is None
    assert model.special == SpecialTokens(bos_id=1, eos_ids=(2,), pad_id=5)
    assert model.chat_template == "{{ messages }}"
    with pytest.raises(ModelFileError, match="'tekken' is not supported"):
        model.tokenizer()


def test_text_that_is_no_tokenizer():
    with pytest.raises(ModelFileError, match=r"x\.json: not a tokenizer .*JSON"):
        parse_tokenizer("x.json", "{")
    with pytest.raises(ModelFileError, match=r"x\.json: not a tokenizer"):
        parse_tokenizer("x.json", json.dumps({"model": {"type": "BPE"}}))
