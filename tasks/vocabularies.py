"""Vocabularies without TensorFlow: bytes, SentencePiece and Hugging Face tokenizers.

Each encodes batches of texts to ids and turns into the seqio vocabulary with the same ids by
`to_seqio`, which is the only place here that imports seqio (and with it TensorFlow). No vocabulary
adds ids of its own: bos and eos are the caller's to add.
"""

import abc
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
import tokenizers

from sira_jax import json_text
from sira_jax.errors import DataError
from sira_jax.files import read_bytes
from sira_jax.tokenizer_text import library_errors, make_tokenizer, read_spiece

if TYPE_CHECKING:
    import seqio


class Vocabulary(abc.ABC):
    """Texts to ids and back.

    Attributes:
      vocab_size: number of ids.
      eos_id: ends a sequence; None where the vocabulary has none.
      bos_id, unk_id: None where the vocabulary has none.
      pad_id: fills rows.
    """

    vocab_size: int
    eos_id: int | None
    bos_id: int | None = None
    unk_id: int | None = None
    pad_id: int = 0

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without bos or eos."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that are all in range."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short text that differs wherever ids could."""

    @abc.abstractmethod
    def to_seqio(self) -> "seqio.Vocabulary":
        """The seqio vocabulary with the same ids."""

    @abc.abstractmethod
    def id_to_text(self, token_id: int) -> str:
        """One token, to show it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` up to the first eos.

        Ids out of range become unk, or are left out where there is none.
        """
        kept = []
        for token_id in map(int, ids):
            if token_id == self.eos_id:
                break
            if 0 <= token_id < self.vocab_size:
                kept.append(token_id)
            elif self.unk_id is not None:
                kept.append(self.unk_id)
        return self._decode(kept)


class ByteVocabulary(Vocabulary):
    """ByT5's vocabulary: id = UTF-8 byte + 3; pad 0, eos 1, unk 2 (Xue et al. 2022)."""

    _OFFSET = 3
    vocab_size = 256 + _OFFSET
    eos_id = 1
    unk_id = 2

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + self._OFFSET for byte in text.encode("utf-8")] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        data = bytes(i - self._OFFSET for i in ids if i >= self._OFFSET)
        return data.decode("utf-8", errors="ignore")

    def id_to_text(self, token_id: int) -> str:
        special = {0: "<pad>", self.eos_id: "<eos>", self.unk_id: "<unk>"}
        if token_id in special:
            return special[token_id]
        byte = token_id - self._OFFSET
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"

    def fingerprint(self) -> str:
        return "bytes"

    def to_seqio(self) -> "seqio.Vocabulary":
        import seqio

        return seqio.ByteVocabulary()


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model file. Raises DataError where the file is none."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        data = _read(self.path, "SentencePiece model")
        try:
            read_spiece(data)
        except ValueError as error:
            raise DataError(f"{self.path} is not a SentencePiece model: {error}") from None
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError:
            raise DataError(f"{self.path} is not a SentencePiece model") from None
        self._digest = hashlib.sha256(data).hexdigest()[:16]
        self.vocab_size = self._model.GetPieceSize()
        self.eos_id, self.bos_id, self.unk_id = (
            None if token_id < 0 else token_id
            for token_id in (self._model.eos_id(), self._model.bos_id(), self._model.unk_id())
        )
        self.pad_id = max(self._model.pad_id(), 0)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.EncodeAsIds(list(texts))

    def _decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds(ids)

    def id_to_text(self, token_id: int) -> str:
        return self._model.IdToPiece(token_id)

    def fingerprint(self) -> str:
        return f"sentencepiece-{self._digest}"

    def to_seqio(self) -> "seqio.Vocabulary":
        import seqio

        return seqio.SentencePieceVocabulary(str(self.path), extra_ids=0)


class TokenizersVocabulary(Vocabulary):
    """A Hugging Face tokenizer through the `tokenizers` library.

    Args:
      tokenizer_json: a tokenizer.json, its text or its path.
      eos_id, bos_id, unk_id, pad_id: special ids, which a tokenizer.json does not state.
      skip_special_tokens: whether `decode` leaves out special tokens.
      origin: where the tokenizer is from, for messages; its path unless given.

    Raises:
      DataError: the file is missing or no tokenizer, or an id is not one of its ids.
    """

    def __init__(
        self,
        tokenizer_json: str | os.PathLike,
        *,
        eos_id: int | None,
        bos_id: int | None = None,
        unk_id: int | None = None,
        pad_id: int = 0,
        skip_special_tokens: bool = True,
        origin: str = "",
    ):
        self.tokenizer_json, self._tokenizer = _load_tokenizer(tokenizer_json)
        is_text = self.tokenizer_json is tokenizer_json
        self._origin = origin or ("tokenizer_json" if is_text else os.fspath(tokenizer_json))
        # Limits stored in the file would cut or pad examples behind our back.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._skip_special_tokens = skip_special_tokens
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise DataError(f"{self._origin} is not a tokenizer: it has no tokens")
        self.vocab_size = 1 + max(ids)
        self.eos_id, self.bos_id, self.unk_id, self.pad_id = eos_id, bos_id, unk_id, pad_id
        for name in ("eos_id", "bos_id", "unk_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise DataError(
                    f"{self._origin}: {name}={value} is not allowed: 0 to {self.vocab_size - 1}"
                )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _library_errors(self._origin):
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        with _library_errors(self._origin):
            return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def id_to_text(self, token_id: int) -> str:
        # Byte-level tokens are shown as text, a token that is a part of a character by its piece.
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.id_to_token(token_id) or "" if "\ufffd" in text else text

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.tokenizer_json.encode()).hexdigest()[:16]
        specials = (self.eos_id, self.bos_id, self.unk_id, self.pad_id, self._skip_special_tokens)
        return f"tokenizers-{digest}-" + "-".join(map(str, specials))

    def to_seqio(self) -> "seqio.Vocabulary":
        from tasks.seqio_vocabularies import HuggingFaceVocabulary

        return HuggingFaceVocabulary(
            self.tokenizer_json,
            eos_id=self.eos_id,
            bos_id=self.bos_id,
            unk_id=self.unk_id,
            pad_id=self.pad_id,
            skip_special_tokens=self._skip_special_tokens,
        )


@contextlib.contextmanager
def _library_errors(origin: str) -> Iterator[None]:
    """Turns what the tokenizers library raises, as where the unknown token is not in the vocabulary, into a DataError."""
    try:
        with library_errors():
            yield
    except ValueError as error:
        raise DataError(f"{origin}: the tokenizer cannot be used: {error}") from None


class _SeqioAdapter(Vocabulary):
    """Any seqio vocabulary, one text at a time."""

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.vocab_size
        self.eos_id, self.unk_id = vocabulary.eos_id, vocabulary.unk_id
        self.bos_id, self.pad_id = None, vocabulary.pad_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._vocabulary.encode(text)) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids)

    def id_to_text(self, token_id: int) -> str:
        return self._vocabulary.decode([token_id])

    def fingerprint(self) -> str:
        return f"{self._vocabulary}"

    def to_seqio(self) -> "seqio.Vocabulary":
        return self._vocabulary


def _load_tokenizer(source: str | os.PathLike) -> tuple[str, tokenizers.Tokenizer]:
    """Text and tokenizer of a tokenizer.json, from its text or its path."""
    text, name = source, "tokenizer_json"
    if not isinstance(source, str) or not source.lstrip().startswith("{"):
        name = os.fspath(source)
        try:
            text = _read(Path(name), "tokenizer").decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{name} is not a tokenizer: it is not UTF-8 text") from None
    try:
        return text, make_tokenizer(text)
    except ValueError as error:
        raise DataError(f"{name} is not a tokenizer: {error}") from None


def _read(path: Path, what: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from None


def _special_ids(path: Path, tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """Special ids from the tokenizer_config.json beside a tokenizer.json, where there is one."""
    config_path = path.parent / "tokenizer_config.json"
    if not config_path.is_file():
        return {}
    try:
        config = json_text.parse(_read(config_path, "tokenizer config"))
        texts = {name: config.get(f"{name}_token") for name in ("eos", "bos", "unk", "pad")}
    except (ValueError, AttributeError):
        raise DataError(f"{config_path} is not a JSON object") from None
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in texts.items()}
    ids = {f"{k}_id": tokenizer.token_to_id(v) for k, v in texts.items() if isinstance(v, str)}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def make_vocabulary(spec: str) -> Vocabulary:
    """The vocabulary of "bytes", "sentencepiece:/path" or "tokenizers:/path/tokenizer.json".

    The special tokens of a tokenizer.json are those of the tokenizer_config.json beside it, or are
    given after the path: "tokenizers:/path/tokenizer.json,eos=</s>,pad=<pad>".

    Raises:
      DataError: another text, a file that is missing or damaged, an unknown or missing special
        token.
    """
    kind, _, rest = spec.partition(":")
    if kind == "bytes" and not rest:
        return ByteVocabulary()
    if kind == "sentencepiece" and rest:
        return SentencePieceVocabulary(rest)
    if kind == "tokenizers" and rest:
        return _tokenizers_vocabulary(rest)
    raise DataError(
        f"vocabulary={spec!r} is not allowed: "
        "use bytes, sentencepiece:/path or tokenizers:/path/tokenizer.json"
    )


def _tokenizers_vocabulary(rest: str) -> Vocabulary:
    name, *options = rest.split(",")
    path = Path(name)
    text, tokenizer = _load_tokenizer(path)
    ids = _special_ids(path, tokenizer)
    for option in options:
        key, _, token = option.partition("=")
        if key not in ("eos", "bos", "unk", "pad"):
            raise DataError(f"vocabulary option {option!r}: use eos=, bos=, unk= or pad=")
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise DataError(f"{path} has no token {token!r} for {key}")
        ids[f"{key}_id"] = token_id
    if "eos_id" not in ids:
        raise DataError(
            f"{path}: which token ends a sequence? Put tokenizer_config.json beside it, or write "
            f"tokenizers:{path},eos=TOKEN"
        )
    return TokenizersVocabulary(text, **ids, origin=name)


def as_vocabulary(vocabulary: "Vocabulary | seqio.Vocabulary | str") -> Vocabulary:
    """The vocabulary itself, that of a spec (`make_vocabulary`), or a wrapped seqio vocabulary.

    Raises DataError for anything else.
    """
    if isinstance(vocabulary, Vocabulary):
        return vocabulary
    if isinstance(vocabulary, str):
        return make_vocabulary(vocabulary)
    if isinstance(native := getattr(vocabulary, "native", None), Vocabulary):
        return native
    if hasattr(vocabulary, "encode_tf"):
        return _SeqioAdapter(vocabulary)
    raise DataError(f"vocabulary={vocabulary!r} is neither a spec nor a vocabulary")
