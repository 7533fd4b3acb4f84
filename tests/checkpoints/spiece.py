"""A small SentencePiece model, trained here."""

import functools
import io

import sentencepiece

TEXTS = (
    "the quick brown fox jumps over the lazy dog 12 times",
    "naïve café, Straße und Übung",
    "日本語の文と中文",
    "quick foxes are quicker than dogs",
    "Karibu sana, habari ya asubuhi",
)


@functools.lru_cache
def train(**options: object) -> bytes:
    """The model proto: unigram unless `options` says otherwise, with T5's special ids (pad 0, eos 1, unk 2, no bos)."""
    model = io.BytesIO()
    fields = {
        "vocab_size": 120,
        "model_type": "unigram",
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, **fields | options
    )
    return model.getvalue()
