"""Tokenizers by pieces and scores against the sentencepiece library, with models that it trains here."""

import io

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sira_jax.checkpoints.spm_bpe import NORMAL, SPACE, merges
from sira_jax.checkpoints.tokenizer import (
    parse_tokenizer,
    special_tokens_from_gguf,
    tokenizer_from_gguf,
)
from sira_jax.errors import ModelFileError

TEXT = """The sun rises in the east and sets in the west; the rest of the stars rise and set as it does.
In the evening they come home, and on the next morning they rise again, as the others do.
Habari ya asubuhi: jua linachomoza mashariki na kutua magharibi. 12 miezi, 365 siku, 24 saa.
হাজার তারা রাতের আকাশে ওঠে আর ডোবে, সকালে সূর্য ওঠে। Ñandú, Übung, naïve café."""
RUNS = [SPACE * 2, SPACE * 3, SPACE * 4, "\n", "\n\n", "\t", "<tool>"]


def train(starts_with_space: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        add_dummy_prefix=starts_with_space,
        remove_extra_whitespaces=False,
        user_defined_symbols=[] if starts_with_space else RUNS,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gguf_fields(processor, starts_with_space: bool, **changes: object) -> dict[str, object]:
    """As llama.cpp's converter writes them: spaces in user-defined pieces are those of a text."""
    ids = range(processor.get_piece_size())
    types = [NORMAL] * len(ids)
    for kind, holds in (
        (2, processor.is_unknown),
        (3, processor.is_control),
        (5, processor.is_unused),
        (6, processor.is_byte),
    ):
        types = [kind if holds(index) else own for index, own in zip(ids, types, strict=True)]
    pieces = [processor.id_to_piece(index) for index in ids]
    types = [4 if piece in RUNS else own for piece, own in zip(pieces, types, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            piece.replace(SPACE, " ") if own == 4 else piece
            for piece, own in zip(pieces, types, strict=True)
        ],
        "tokenizer.ggml.scores": [
            processor.get_score(index) if own == NORMAL else -1000.0
            for index, own in zip(ids, types, strict=True)
        ],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": starts_with_space,
        **changes,
    }


def build(fields):
    return parse_tokenizer("a.gguf", tokenizer_from_gguf("a.gguf", fields))


@pytest.fixture(scope="module")
def gemma_like():
    """(sentencepiece's processor, our tokenizer): runs of spaces and line ends are pieces, no space is put before."""
    processor = train(starts_with_space=False)
    return processor, build(gguf_fields(processor, starts_with_space=False))


@pytest.fixture(scope="module")
def llama_like():
    """The same of a model that takes each text as if a space stood before it."""
    processor = train(starts_with_space=True)
    return processor, build(gguf_fields(processor, starts_with_space=True))


# Written in a text they are ids of ours, and letters to sentencepiece: test_special_tokens.
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
TEXTS = st.text(
    st.sampled_from(sorted({*TEXT, *"\n\t <>tool", "🦄", "日", "\x07", "\u0301"})), max_size=30
).filter(lambda text: not any(token in text for token in SPECIAL))


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text="  the  rest   of    the     stars")
@example(text="\n\n\nthe\t\n<tool>the<tool>")
@example(text="日本 🦄 the")
@example(text=TEXT)
def test_ids_are_those_of_sentencepiece(gemma_like, text):
    processor, tokenizer = gemma_like
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXTS.filter(bool))
@example(text="the rest")
@example(text="  the  rest")
def test_ids_with_a_space_before_are_those_of_sentencepiece(llama_like, text):
    processor, tokenizer = llama_like
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text


def test_the_texts_use_what_they_are_to_test(gemma_like):
    processor, tokenizer = gemma_like
    tokens = tokenizer.encode("  the\n\n日<tool>", add_special_tokens=False).tokens
    assert tokens == ["  ", "the", "\n\n", "<0xE6>", "<0x97>", "<0xA5>", "<tool>"]
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT) * 0.8
    assert processor.get_piece_size() == 480


def test_special_tokens(gemma_like):
    processor, tokenizer = gemma_like
    assert tokenizer.encode("the").tokens[0] == "<s>"
    fields = gguf_fields(processor, False, **{"tokenizer.ggml.add_bos_token": False})
    assert build(fields).encode("the").ids == processor.encode("the")
    # Unlike in sentencepiece, the end may be written in a text, as in all of our tokenizers.
    ids = tokenizer.encode("the</s>", add_special_tokens=False).ids
    assert ids == [*processor.encode("the"), 1]
    assert tokenizer.decode(ids) == "the"
    special = special_tokens_from_gguf(fields, 480)
    assert (special.bos_id, special.eos_ids, special.pad_id) == (2, (1,), 0)


def test_pairs_come_in_the_order_of_their_unions_scores():
    tokens = ["a", "b", "ab", "ba", "aba", "x<0x41>", "<0x41>"]
    scores = [-3.0, -4.0, -1.0, -0.5, -2.0, 0.0, 0.0]
    types = [NORMAL] * 5 + [NORMAL, 6]
    # "x<0x41>" is no union: a byte's name is no text.
    assert merges(tokens, scores, types) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores has 1 entries.*tokens 480"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ],
)
def test_others_are_refused(gemma_like, changes, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        build(gguf_fields(gemma_like[0], False, **changes))
    assert "a.gguf" in str(caught.value)
