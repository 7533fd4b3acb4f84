"""Writes stories260K as a Hugging Face folder, for the scripts, which read no llama2.c files.

python -m tests.make_stories260k runs/stories260K
"""

import json
import os
import sys
from pathlib import Path

from sira_jax.checkpoints import SpecialTokens, save_hf_folder
from tests import stories260k

_SPACE = "\u2581"


def tokenizer_json(tokenizer: stories260k.Tokenizer) -> str:
    """The same tokenizer as a tokenizer.json: merges in the order of the scores of what they make."""
    names = {stories260k.BOS: "<s>", stories260k.EOS: "</s>"}
    pieces = [
        names.get(index, piece.decode().replace(" ", _SPACE))
        for index, piece in enumerate(tokenizer.pieces)
    ]
    ids = {piece: index for index, piece in enumerate(pieces)}
    assert len(ids) == len(pieces)
    ranked = sorted(
        (-tokenizer.scores[index], index, cut)
        for piece, index in ids.items()
        if not piece.startswith("<")
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    merges = [[pieces[index][:cut], pieces[index][cut:]] for _, index, cut in ranked]
    special = [
        {
            "id": ids[name],
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for name in ("<unk>", "<s>", "</s>")
    ]
    content = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def write(path: str | os.PathLike) -> None:
    """Writes the folder; the files of `stories260k.folder()` must be there."""
    config, params, tokenizer = stories260k.read()
    special = SpecialTokens(bos_id=stories260k.BOS, eos_ids=(stories260k.EOS,), pad_id=0)
    save_hf_folder(path, config, params, tokenizer_json(tokenizer), special)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.make_stories260k FOLDER")
    if not stories260k.is_there():
        sys.exit(f"error: {stories260k.folder()}: no stories260K there; set SIRA_TEST_DATA")
    write(Path(sys.argv[1]))
