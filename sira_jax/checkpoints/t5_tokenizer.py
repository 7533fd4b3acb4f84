"""Tokenizers of the T5 family as the text of a Hugging Face tokenizer.json, where a folder has none: SentencePiece's unigram
model (spiece.model) and ByT5's bytes.

Sources: the sentencepiece library, with whose own ids tests compare; arXiv 2105.13626 (ByT5: bytes after three special ids).
"""

import base64
import json

from sentencepiece import sentencepiece_model_pb2

from sira_jax.errors import ModelFileError
from sira_jax.tokenizer_text import read_spiece

SPIECE = "spiece.model"
_UNIGRAM = 1  # of trainer_spec.model_type
_CONTROL, _USER_DEFINED = 3, 4  # values of a piece's type
_SPACE = "▁"
_BYTE_SPECIALS = ("<pad>", "</s>", "<unk>")


def tokenizer_from_spiece(
    path: str, data: bytes, vocab_size: int, extra_ids: int | None = None
) -> str:
    """Returns the text of a tokenizer.json for a SentencePiece model.

    Args:
      path: where the model is from, for messages.
      data: content of the file.
      vocab_size: rows of the model's embedding.
      extra_ids: how many sentinels <extra_id_N> follow the pieces, the highest N first. None: 100, as T5's vocabularies
        have, unless the pieces hold them already or the embedding has no room for them (mT5).

    Raises:
      ModelFileError: if it is no such model, of another kind, or has more ids than the embedding.
    """
    try:
        proto = read_spiece(data)
    except ValueError as error:
        raise ModelFileError(f"{path}: not a SentencePiece model: {error}") from None
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type != _UNIGRAM:
        name = trainer.ModelType.Name(trainer.model_type)
        raise ModelFileError(f"{path}: trainer_spec.model_type={name} is not supported: UNIGRAM")
    if trainer.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise ModelFileError(
            f"{path}: is not supported: whitespace must be a prefix of pieces, written {_SPACE}"
        )
    if extra_ids is None:
        has_them = any(piece.piece.endswith("<extra_id_0>") for piece in pieces)
        extra_ids = 0 if has_them or len(pieces) + 100 > vocab_size else 100
    if len(pieces) + extra_ids > vocab_size:
        raise ModelFileError(
            f"{path}: {len(pieces)} pieces and {extra_ids} extra ids, but the model has vocab_size={vocab_size}"
        )
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    added = [
        _added_token(index, piece.piece, special=piece.type == _CONTROL)
        for index, piece in enumerate(pieces)
        if piece.type in (_CONTROL, _USER_DEFINED)
    ]
    added += [
        _added_token(index, name, special=True)
        for index, name in enumerate(sentinels, start=len(pieces))
    ]
    spec = proto.normalizer_spec
    scheme = "always" if spec.add_dummy_prefix else "never"
    space = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": scheme,
        "split": trainer.split_by_whitespace,
    }
    model = {
        "type": "Unigram",
        "unk_id": trainer.unk_id,
        "vocab": [[piece.piece, piece.score] for piece in pieces]
        + [[name, 0.0] for name in sentinels],
        "byte_fallback": trainer.byte_fallback,
    }
    ends = 0 <= trainer.eos_id < len(pieces)
    return _tokenizer_json(
        added_tokens=added,
        normalizer=_normalizer(spec),
        pre_tokenizer=space,
        post_processor=_append(pieces[trainer.eos_id].piece, trainer.eos_id) if ends else None,
        decoder=space,
        model=model,
    )


def byte_tokenizer() -> str:
    """Returns the text of a tokenizer.json of ByT5: <pad>, </s>, <unk>, then byte b as b + 3."""
    vocab = {name: index for index, name in enumerate(_BYTE_SPECIALS)}
    vocab |= {character: byte + 3 for byte, character in enumerate(_byte_characters())}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    # A model without merges leaves each byte a token.
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [],
    }
    return _tokenizer_json(
        added_tokens=[
            _added_token(index, name, special=True) for index, name in enumerate(_BYTE_SPECIALS)
        ],
        normalizer=None,
        pre_tokenizer=level,
        post_processor=_append("</s>", 1),
        decoder=level,
        model=model,
    )


def _tokenizer_json(**parts: object) -> str:
    content = {"version": "1.0", "truncation": None, "padding": None, **parts}
    return json.dumps(content, ensure_ascii=False)


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> dict | None:
    steps: list[dict] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _added_token(index: int, content: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


def _append(token: str, index: int) -> dict:
    """Puts `token` after a text, and after each of two."""
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level models: itself where it can be seen, else from U+0100 on."""
    characters, other = [], 256
    for byte in range(256):
        is_seen = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        characters.append(chr(byte if is_seen else other))
        other += not is_seen
    return characters
