"""SentencePiece's byte-pair encoding, given by its pieces and scores, as parts of a Hugging Face tokenizer.json.

SentencePiece joins, again and again, the two neighbours whose union is the piece of the highest score. The tokenizers library
joins by a list of pairs, the first of them first: for each piece, all pairs of pieces that make it up, in the order of the
pieces' scores. Both give the same unless a piece can be made in two ways at once in one place. Source: the sentencepiece
library's BPE model [O], which tests compare with.
"""

from collections.abc import Mapping, Sequence

SPACE = "▁"  # how a space is written in pieces
# Values of tokenizer.ggml.token_type, which are sentencepiece's own.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Returns pairs of pieces whose union is a piece, the union of the highest score first."""
    scores_of = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == NORMAL
    }
    pairs = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in scores_of.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores_of and piece[cut:] in scores_of
    ]
    pairs.sort()
    return [(left, right) for *_, left, right in pairs]


def tokenizer_parts(
    vocab: Mapping[str, int],
    scores: Sequence[float],
    types: Sequence[int],
    unknown: str | None,
    starts_with_space: bool,
) -> dict[str, object]:
    """Returns the normalizer, pre_tokenizer, decoder and model of a tokenizer.json.

    Args:
      vocab: piece -> id, in the order of the ids.
      scores: by id.
      types: by id, see above.
      unknown: the piece that stands for what no other piece and no bytes stand for.
      starts_with_space: a text is taken as if a space stood before it.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: dict[str, object] = replace
    if starts_with_space:
        prepend = {"type": "Prepend", "prepend": SPACE}
        normalizer = {"type": "Sequence", "normalizers": [prepend, replace]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": BYTE in types,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(list(vocab), scores, types),
        },
    }
