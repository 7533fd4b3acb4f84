"""Making a tokenizer of a tokenizer.json; SentencePiece's table of characters is checked before a library walks through it.

The tokenizers library follows the offsets in such a table (`precompiled_charsmap`) without a look at their range, and panics,
which no handler of exceptions sees, where one leads outside. The table is, after 4 bytes with its length, a trie as a double
array of 32-bit units, and then texts, each ended by a NUL, which the trie's values point into. Source: the sentencepiece and
darts-clone libraries [O].
"""

import base64
import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from sira_jax import json_text

_IS_VALUE = 1 << 31
_BLOCK = 256  # a unit's children are in one block of so many


def check_charsmap(data: bytes) -> None:
    """Raises ValueError unless every step through the table, by any text, stays inside it."""
    length = int.from_bytes(data[:4], "little")
    if len(data) < 4 or length % (4 * _BLOCK) or not 0 < length <= len(data) - 4:
        raise ValueError("its trie is of a wrong length")
    texts = data[4 + length :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("its texts are no UTF-8") from None
    if texts[-1:] != b"\0":
        raise ValueError("its last text has no end")
    units = np.frombuffer(data, "<u4", length // 4, 4).astype(np.int64)
    inner = np.flatnonzero(units < _IS_VALUE)
    own = units[inner]
    children = inner ^ ((own >> 10) << ((own & (1 << 9)) >> 6))
    if np.any(children >= len(units)):
        raise ValueError("its trie points beyond its end")
    values = units[children[(own >> 8) & 1 == 1]] & (_IS_VALUE - 1)
    if np.any(values >= len(texts)):
        raise ValueError("its trie points beyond its texts")
    if np.any((np.frombuffer(texts, np.uint8)[values] & 0xC0) == 0x80):
        raise ValueError("its trie points into a character")


def read_spiece(data: bytes) -> sentencepiece_model_pb2.ModelProto:
    """A SentencePiece model's pieces and settings; ValueError if it is none, or not to be trusted to a library."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ValueError("it cannot be read") from None
    if not proto.pieces:
        raise ValueError("it has no pieces")
    # Bytes where it is no UTF-8.
    if any(not isinstance(piece.piece, str) for piece in proto.pieces):
        raise ValueError("it has a piece that is no UTF-8")
    if proto.normalizer_spec.precompiled_charsmap:
        try:
            check_charsmap(proto.normalizer_spec.precompiled_charsmap)
        except ValueError as error:
            raise ValueError(f"precompiled_charsmap cannot be used: {error}") from None
    return proto


def make_tokenizer(text: str) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a tokenizer.json describes; ValueError if it describes none."""
    try:
        content = json_text.parse(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is needed, found {type(content).__name__}")
    for table in _tables(content.get("normalizer")):
        try:
            check_charsmap(base64.b64decode(table, validate=True))
        except (TypeError, ValueError) as error:
            raise ValueError(f"precompiled_charsmap cannot be used: {error}") from None
    if isinstance(model := content.get("model"), dict):
        _check_merges(model)
    with library_errors():
        return tokenizers.Tokenizer.from_str(text)


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turns what the tokenizers library raises into a ValueError: it has no class of its own but that of its panics."""
    try:
        yield
    except BaseException as error:
        # The class of panics is no Exception, and cannot be imported.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def _check_merges(model: Mapping) -> None:
    """Raises ValueError for a pair that makes no token: the library panics where it would be longer than all of them."""
    vocab, merges = model.get("vocab"), model.get("merges")
    prefix = model.get("continuing_subword_prefix") or ""
    if not (isinstance(vocab, dict) and isinstance(merges, list) and isinstance(prefix, str)):
        return  # another kind of model, or what the library itself refuses
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            continue
        left, right = pair
        if not right.startswith(prefix) or left + right.removeprefix(prefix) not in vocab:
            raise ValueError(f"the merge {merge!r} makes no token of the vocabulary")


def _tables(value: object) -> Iterator[object]:
    """Those of a normalizer and of the normalizers in it."""
    if isinstance(value, list):
        for part in value:
            yield from _tables(part)
    elif isinstance(value, Mapping):
        if "precompiled_charsmap" in value:
            yield value["precompiled_charsmap"]
        yield from _tables(list(value.values()))
