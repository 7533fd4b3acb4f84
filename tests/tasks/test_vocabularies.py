"""Vocabularies without TensorFlow; those of seqio are compared with them in test_registry.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.errors import DataError
from tasks.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    as_vocabulary,
    make_vocabulary,
)
from tests.tasks.conftest import EOS, PAD

TEXTS = ["Jumatatu, 30 Julai 2001", "2.5 రోజులు", "1\u202f000\u00a0kilowatts", "a\u200cb", "", " x "]


@pytest.fixture
def tokenizer_path(tokenizer_json, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json)
    return path


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    text = text.encode("utf-8", "ignore").decode()
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert ids == [byte + 3 for byte in text.encode()]
    assert vocabulary.decode(ids) == text


def test_bytes_by_hand():
    vocabulary = make_vocabulary("bytes")
    assert (vocabulary.vocab_size, vocabulary.pad_id, vocabulary.eos_id) == (259, 0, 1)
    assert vocabulary.encode("aé") == [100, 198, 172]
    assert vocabulary.decode([100, 0, 198, 1, 100]) == "a"
    assert vocabulary.decode([100, 999, -4, 101]) == "ab"
    assert [vocabulary.id_to_text(i) for i in (0, 1, 2, 100, 13)] == [
        "<pad>",
        "<eos>",
        "<unk>",
        "a",
        "<0x0A>",
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_round_trip(tokenizer_json, text):
    vocabulary = TokenizersVocabulary(tokenizer_json, eos_id=2)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_tokenizers_special_tokens(tokenizer_json):
    vocabulary = TokenizersVocabulary(tokenizer_json, eos_id=2)
    assert vocabulary.encode("<|im_start|>a") == [1, *vocabulary.encode("a")]
    ids = vocabulary.encode("ab")
    assert vocabulary.decode([*ids, 2, *ids]) == "ab"
    assert vocabulary.decode([1, *ids]) == "ab"
    shown = TokenizersVocabulary(tokenizer_json, eos_id=2, skip_special_tokens=False)
    assert shown.decode([1, *ids, 2]) == "<|im_start|>ab"
    assert vocabulary.decode([*ids, 9999]) == "ab"


def test_tokenizers_ignore_stored_limits(tokenizer_json):
    fields = json.loads(tokenizer_json)
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    limited = TokenizersVocabulary(json.dumps(fields), eos_id=2)
    plain = TokenizersVocabulary(tokenizer_json, eos_id=2)
    assert limited.encode(TEXTS[0]) == plain.encode(TEXTS[0])


def test_sentencepiece(sentencepiece_path):
    vocabulary = make_vocabulary(f"sentencepiece:{sentencepiece_path}")
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert vocabulary.vocab_size == 400
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.bos_id is None
    ids = vocabulary.encode(TEXTS[0])
    assert vocabulary.decode([*ids, 1, *ids]) == TEXTS[0]
    assert vocabulary.encode_batch(TEXTS[:2]) == [vocabulary.encode(text) for text in TEXTS[:2]]


def test_special_tokens_from_the_config_beside_the_file(tokenizer_path):
    config = {"eos_token": {"content": EOS}, "pad_token": PAD, "bos_token": None}
    (tokenizer_path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = make_vocabulary(f"tokenizers:{tokenizer_path}")
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.bos_id) == (2, 0, None)


def test_special_tokens_in_the_spec(tokenizer_path):
    vocabulary = make_vocabulary(f"tokenizers:{tokenizer_path},eos={EOS},bos=<|im_start|>")
    assert (vocabulary.eos_id, vocabulary.bos_id) == (2, 1)


def test_fingerprints(tokenizer_json, sentencepiece_path):
    fingerprints = {
        ByteVocabulary().fingerprint(),
        SentencePieceVocabulary(sentencepiece_path).fingerprint(),
        TokenizersVocabulary(tokenizer_json, eos_id=2).fingerprint(),
        TokenizersVocabulary(tokenizer_json, eos_id=1).fingerprint(),
    }
    assert len(fingerprints) == 4


def test_as_vocabulary():
    vocabulary = ByteVocabulary()
    assert as_vocabulary(vocabulary) is vocabulary
    assert isinstance(as_vocabulary("bytes"), ByteVocabulary)
    with pytest.raises(DataError, match="neither a spec nor a vocabulary"):
        as_vocabulary(3)


@pytest.mark.parametrize(
    "spec", ["", "byte", "bytes:x", "sentencepiece:", "tokenizers", "hf:/x", "/a/tokenizer.json"]
)
def test_unknown_specs(spec):
    with pytest.raises(DataError, match="use bytes, sentencepiece:/path or tokenizers:/path"):
        make_vocabulary(spec)


def test_bad_files(tmp_path, tokenizer_path):
    for kind, what in (("sentencepiece", "SentencePiece model"), ("tokenizers", "tokenizer")):
        with pytest.raises(DataError, match=f"cannot read the {what} .*none: No such file"):
            make_vocabulary(f"{kind}:{tmp_path}/none")
        with pytest.raises(DataError, match=f"cannot read the {what} .*: Is a directory"):
            make_vocabulary(f"{kind}:{tmp_path}")
        for data in (b"", b"garbage", b"\xff\xfe\x00", b"{}", b'{"model": 3}'):
            (tmp_path / "bad").write_bytes(data)
            with pytest.raises(DataError, match=rf"bad is not a {what}"):
                make_vocabulary(f"{kind}:{tmp_path}/bad")
    with pytest.raises(DataError, match="which token ends a sequence"):
        make_vocabulary(f"tokenizers:{tokenizer_path}")
    with pytest.raises(DataError, match="has no token '</s>' for eos"):
        make_vocabulary(f"tokenizers:{tokenizer_path},eos=</s>")
    with pytest.raises(DataError, match="vocabulary option 'end=x': use eos="):
        make_vocabulary(f"tokenizers:{tokenizer_path},end=x")
    (tokenizer_path.parent / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        make_vocabulary(f"tokenizers:{tokenizer_path}")


def test_ids_outside_the_tokenizer(tokenizer_json):
    with pytest.raises(DataError, match="eos_id=500 is not allowed: 0 to 499"):
        TokenizersVocabulary(tokenizer_json, eos_id=500)
