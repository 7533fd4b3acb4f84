"""Tokenizers of the T5 family against the sentencepiece library and against bytes."""

import pytest
import sentencepiece
import tokenizers

from sira_jax.checkpoints.t5_tokenizer import byte_tokenizer, tokenizer_from_spiece
from sira_jax.errors import ModelFileError
from tests.checkpoints.spiece import TEXTS, train

SENTENCES = (
    *TEXTS,
    "  leading and   inner   spaces  ",
    "Ｆｕｌｌ　ｗｉｄｔｈ ﬁ ligature ½",
    "unknown: Ж ¤ 漢",
    "line\nbreaks\tand tabs",
    "x",
    "",
)


def ids(text, sentence, special=False):
    return tokenizers.Tokenizer.from_str(text).encode(sentence, add_special_tokens=special).ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "vocab_size": 380},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"split_by_whitespace": False, "normalization_rule_name": "identity"},
    ],
    ids=["t5", "bytes", "no prefix", "whole sentences"],
)
def test_ids_are_those_of_sentencepiece(options):
    data = train(**options)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    text = tokenizer_from_spiece("spiece.model", data, 1000)
    decoder = tokenizers.Tokenizer.from_str(text)
    for sentence in SENTENCES:
        expected = model.encode(sentence)
        assert ids(text, sentence) == expected, sentence
        assert ids(text, sentence, special=True) == [*expected, 1]
        if model.unk_id() not in expected and not options:
            assert decoder.decode(expected) == model.decode(expected)


def test_extra_ids_follow_the_pieces_the_highest_first():
    data = train()
    count = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    text = tokenizer_from_spiece("spiece.model", data, 1000)
    tokenizer = tokenizers.Tokenizer.from_str(text)
    assert tokenizer.get_vocab_size() == count + 100
    assert tokenizer.token_to_id("<extra_id_99>") == count
    assert tokenizer.token_to_id("<extra_id_0>") == count + 99
    assert count + 99 in ids(text, "the <extra_id_0> fox")
    # None where there is no room, as many as one asks for otherwise.
    for vocab_size, asked, expected in (
        (count + 99, None, 0),
        (count + 100, None, 100),
        (500, 3, 3),
    ):
        text = tokenizer_from_spiece("spiece.model", data, vocab_size, asked)
        assert tokenizers.Tokenizer.from_str(text).get_vocab_size() == count + expected


def test_extra_ids_that_are_pieces_already_are_not_added():
    data = train(user_defined_symbols="<extra_id_0>,<extra_id_1>")
    count = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    text = tokenizer_from_spiece("spiece.model", data, 1000)
    assert tokenizers.Tokenizer.from_str(text).get_vocab_size() == count
    assert ids(text, "<extra_id_1>") == [
        tokenizers.Tokenizer.from_str(text).token_to_id("<extra_id_1>")
    ]


@pytest.mark.parametrize(
    ("data", "vocab_size", "message"),
    [
        (b"\xff\xfe no proto", 1000, "not a SentencePiece model"),
        (b"", 1000, "it has no pieces"),
        ("bpe", 1000, "model_type=BPE is not supported: UNIGRAM"),
        ("unigram", 50, "pieces and 0 extra ids, but the model has vocab_size=50"),
    ],
)
def test_what_is_not_supported_is_said(data, vocab_size, message):
    data = train(model_type=data) if isinstance(data, str) else data
    with pytest.raises(ModelFileError, match=f"spiece.model: .*{message}"):
        tokenizer_from_spiece("spiece.model", data, vocab_size)


def test_byt5_is_bytes_and_three():
    text = byte_tokenizer()
    for sentence in (*SENTENCES, "".join(map(chr, range(32, 600)))):
        expected = [byte + 3 for byte in sentence.encode()]
        assert ids(text, sentence) == expected
        assert ids(text, sentence, special=True) == [*expected, 1]
        assert tokenizers.Tokenizer.from_str(text).decode(expected) == sentence
    assert tokenizers.Tokenizer.from_str(text).get_vocab_size() == 259
