"""A reader of llama2.c's model and tokenizer files, for tests with the real weights of stories260K.

Format: Andrej Karpathy's llama2.c, `legacy_export` of its export.py and `export` of its
tokenizer.py. Rotary positions are on interleaved pairs, so the rows of q and k are reordered here.
"""

import dataclasses
import itertools
import os
import re
import struct
from pathlib import Path

import numpy as np

from sira_jax.models.config import DecoderConfig

REPOSITORY = Path(__file__).resolve().parents[1]
BOS, EOS = 1, 2
_FIRST_BYTE = 3  # ids 3 to 258 stand for the bytes 0 to 255


def folder() -> Path:
    """Returns $SIRA_TEST_DATA/stories260K; $SIRA_TEST_DATA is ../shared/data unless set."""
    data = os.environ.get("SIRA_TEST_DATA") or REPOSITORY.parent / "shared" / "data"
    return Path(data) / "stories260K"


def is_there() -> bool:
    return all((folder() / name).is_file() for name in ("stories260K.bin", "tok512.bin"))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """SentencePiece-style BPE: the adjacent pair whose union scores best is merged first."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Returns ids of `text`, with a space before it as the model was trained, and BOS first."""
        ids_of = {piece: index for index, piece in enumerate(self.pieces)}
        ids: list[int] = []
        for character in f" {text}" if text else "":
            piece = character.encode()
            known = ids_of.get(piece)
            ids += [byte + _FIRST_BYTE for byte in piece] if known is None else [known]
        while True:
            candidates = [
                (self.scores[merged], -place, merged)
                for place, pair in enumerate(itertools.pairwise(ids))
                if (merged := ids_of.get(self.pieces[pair[0]] + self.pieces[pair[1]])) is not None
            ]
            if not candidates:
                return [BOS, *ids] if bos else ids
            _, place, merged = max(candidates)
            ids[-place : -place + 2] = [merged]

    def decode(self, ids: list[int]) -> str:
        text = b""
        previous = None
        for index in ids:
            piece = self.pieces[index]
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
            if byte:
                piece = bytes([int(byte[1], 16)])
            if previous == BOS and piece.startswith(b" "):
                piece = piece[1:]
            if index not in (BOS, EOS):
                text += piece
            previous = index
        return text.decode(errors="replace")


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    data = path.read_bytes()
    offset = 4  # the longest piece, for buffers in C
    pieces, scores = [], []
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    assert offset == len(data)
    return Tokenizer(tuple(pieces), tuple(scores))


def read_model(path: Path, *, right_layout: bool = True) -> tuple[DecoderConfig, dict]:
    """Returns (config, params) of a llama2.c file.

    Args:
      path: the file.
      right_layout: False leaves the rows of q and k as they are, which is wrong.
    """
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", data)
    head_dim = dim // heads
    kv_dim = kv_heads * head_dim
    values = np.frombuffer(data, "<f4", offset=28)
    offset = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal offset
        size = int(np.prod(shape))
        offset += size
        return values[offset - size : offset].reshape(shape)

    def kernel(out: int, width: int) -> np.ndarray:
        return take(layers, out, width).swapaxes(1, 2)

    def rotated(out: int) -> np.ndarray:
        stored = take(layers, out, dim)
        if right_layout:
            pairs = stored.reshape(layers, out // head_dim, head_dim // 2, 2, dim)
            stored = pairs.swapaxes(2, 3).reshape(stored.shape)
        return stored.swapaxes(1, 2)

    embedding = take(abs(vocab), dim)
    input_norm = take(layers, dim)
    attention = {"q": rotated(dim), "k": rotated(kv_dim), "v": kernel(kv_dim, dim)}
    attention["o"] = kernel(dim, dim)
    mlp_norm = take(layers, dim)
    mlp = {"gate": kernel(hidden, dim), "down": kernel(dim, hidden), "up": kernel(hidden, dim)}
    final_norm = take(dim)
    take(positions, head_dim // 2)  # cosines and sines, which follow from the config
    take(positions, head_dim // 2)
    params = {
        "token_embedder": {"embedding": embedding},
        "layers": {
            "input_norm": {"scale": input_norm},
            "attention": {name: {"kernel": array} for name, array in attention.items()},
            "mlp_norm": {"scale": mlp_norm},
            "mlp": {name: {"kernel": array} for name, array in mlp.items()},
        },
        "final_norm": {"scale": final_norm},
    }
    if vocab < 0:
        params["lm_head"] = {"kernel": take(-vocab, dim).T}
    assert offset == len(values)
    config = DecoderConfig(
        vocab_size=abs(vocab),
        emb_dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=hidden,
        norm_eps=1e-5,
        rope_theta=10000.0,
        tie_embeddings=vocab > 0,
        max_positions=positions,
    )
    return config, params


def read() -> tuple[DecoderConfig, dict, Tokenizer]:
    """Returns (config, params, tokenizer) of the files in `folder()`."""
    config, params = read_model(folder() / "stories260K.bin")
    return config, params, read_tokenizer(folder() / "tok512.bin", config.vocab_size)
