"""Tokenizers as the text of a Hugging Face tokenizer.json, built from a GGUF file's metadata where
there is none.

Byte-level BPE is built (tokenizer.ggml.model "gpt2"), where what splits a text into words depends on
tokenizer.ggml.pre, and SentencePiece's BPE ("llama": Gemma, Llama 2). Source of the patterns: the
published tokenizer.json files of SmolLM2, Qwen2.5 and Llama 3 [O].
"""

import dataclasses
import json
from collections.abc import Callable, Mapping

import tokenizers

from sira_jax.checkpoints import spm_bpe
from sira_jax.errors import ModelFileError
from sira_jax.tokenizer_text import make_tokenizer

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that generation and padding need.

    Attributes:
      bos_id: put before a text by models that were trained so; None if there is none.
      eos_ids: each of them ends a generation.
      pad_id: None if the model names none.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


def _byte_level(**changes: bool) -> dict:
    fields = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel", **fields, **changes}


def _split(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, _byte_level(use_regex=False)],
    }


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a value of tokenizer.ggml.pre stands for."""

    pre_tokenizer: dict
    normalizer: dict | None = None
    ignore_merges: bool = False
    adds_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise


_KINDS = {
    "smollm": _Kind(
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level()],
        }
    ),
    "qwen2": _Kind(_split(_WORDS % r"\p{N}"), normalizer={"type": "NFC"}),
    "llama-bpe": _Kind(_split(_WORDS % r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
}


def parse_tokenizer(path: str, text: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer that the text of a tokenizer.json describes.

    Args:
      path: where the text is from, for messages.
      text: content of the file.

    Raises:
      ModelFileError: if it is not JSON or describes no tokenizer.
    """
    try:
        return make_tokenizer(text)
    except ValueError as error:
        raise ModelFileError(f"{path}: not a tokenizer ({error})") from None


def tokenizer_from_gguf(path: str, metadata: Mapping[str, object]) -> str:
    """Returns the text of a tokenizer.json for a GGUF file's metadata.

    Raises:
      ModelFileError: naming the field, if the file has no tokenizer or one of another kind.
    """

    def get(key: str, kind: type) -> object:
        value = metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, kind):
            raise ModelFileError(
                f"{path}: field tokenizer.ggml.{key} is missing or no {kind.__name__}"
            )
        return value

    model = get("model", str)
    if model not in _MODELS:
        raise ModelFileError(
            f"{path}: tokenizer.ggml.model={model!r} is not supported: {' or '.join(_MODELS)}"
        )
    tokens, types = get("tokens", list), get("token_type", list)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocab) != len(tokens):
        raise ModelFileError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(vocab)} of them "
            f"different, and tokenizer.ggml.token_type {len(types)}; all three must be equal"
        )
    parts, adds_bos = _MODELS[model](path, metadata, get, vocab, types)
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] == spm_bpe.CONTROL,
        }
        for token, index in vocab.items()
        if types[index] in (spm_bpe.CONTROL, spm_bpe.USER_DEFINED)
    ]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    bos_id = _token_id(metadata, "bos", len(tokens))
    if adds_bos is True and bos_id is not None:
        parts["post_processor"] = _put_before(tokens[bos_id], bos_id)
    return json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts},
        ensure_ascii=False,
    )


_Get = Callable[[str, type], object]


def _byte_level_bpe(
    path: str, metadata: Mapping, get: _Get, vocab: Mapping[str, int], types: list
) -> tuple[dict[str, object], bool]:
    """(parts of tokenizer.json, whether a text begins with bos where the file does not say so)."""
    pre = get("pre", str)
    if pre not in _KINDS:
        raise ModelFileError(
            f"{path}: tokenizer.ggml.pre={pre!r} is not supported: one of {', '.join(_KINDS)}"
        )
    kind = _KINDS[pre]
    parts = {
        "normalizer": kind.normalizer,
        "pre_tokenizer": kind.pre_tokenizer,
        "post_processor": _byte_level(trim_offsets=False),
        "decoder": _byte_level(add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.ignore_merges,
            "vocab": vocab,
            "merges": [_merge(path, merge, vocab) for merge in get("merges", list)],
        },
    }
    return parts, kind.adds_bos


def _sentencepiece_bpe(
    path: str, metadata: Mapping, get: _Get, vocab: Mapping[str, int], types: list
) -> tuple[dict[str, object], bool]:
    """The same of a tokenizer by pieces and scores. Its user-defined tokens, runs of spaces among them, are in the file as
    they are in a text.
    """
    scores = get("scores", list)
    if len(scores) != len(vocab):
        raise ModelFileError(
            f"{path}: tokenizer.ggml.scores has {len(scores)} entries, tokenizer.ggml.tokens {len(vocab)}"
        )
    for field in ("precompiled_charsmap", "remove_extra_whitespaces"):
        value = metadata.get(f"tokenizer.ggml.{field}")
        if value:
            raise ModelFileError(f"{path}: tokenizer.ggml.{field} is not supported: none")
    starts_with_space = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    index = _token_id(metadata, "unknown", len(vocab))
    unknown = None if index is None else list(vocab)[index]
    parts = spm_bpe.tokenizer_parts(vocab, scores, types, unknown, starts_with_space)
    return {"post_processor": None, **parts}, True


_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


def _merge(path: str, merge: object, vocab: Mapping[str, int]) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else ()
    if len(parts) != 2 or any(part not in vocab for part in (*parts, "".join(parts))):
        raise ModelFileError(
            f"{path}: tokenizer.ggml.merges holds {merge!r}: two tokens and a space between, whose "
            f"concatenation is a token too"
        )
    return parts[0], parts[1]


def _put_before(token: str, index: int) -> dict:
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    second_bos = {"SpecialToken": {"id": token, "type_id": 1}}
    first, second = ({"Sequence": {"id": id_, "type_id": n}} for n, id_ in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second_bos, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def special_tokens_from_gguf(metadata: Mapping[str, object], vocab_size: int) -> SpecialTokens:
    """Returns the special tokens a GGUF file names; ids outside the vocabulary count as not named.

    Ends of turn and of message (eot, eom) end a generation as the end of text does.
    """
    ends = (_token_id(metadata, name, vocab_size) for name in ("eos", "eot", "eom"))
    return SpecialTokens(
        bos_id=_token_id(metadata, "bos", vocab_size),
        eos_ids=tuple(dict.fromkeys(index for index in ends if index is not None)),
        pad_id=_token_id(metadata, "padding", vocab_size),
    )


def _token_id(metadata: Mapping[str, object], name: str, vocab_size: int) -> int | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return index if type(index) is int and 0 <= index < vocab_size else None


def added_token_id(tokenizer_json: str | None, token: object) -> int | None:
    """Returns the id of an added token given as text or as {"content": text}, None if unknown."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if tokenizer_json is None or not isinstance(content, str):
        return None
    added = json.loads(tokenizer_json).get("added_tokens")
    entries = (
        [entry for entry in added if isinstance(entry, Mapping)] if isinstance(added, list) else []
    )
    ids = [entry.get("id") for entry in entries if entry.get("content") == content]
    return ids[0] if ids and type(ids[0]) is int else None
