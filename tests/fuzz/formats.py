"""Mutations that know a format: they keep the outside of a file in order, so that what is inside is read."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from flax import serialization
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from sira_jax import json_text
from tests.fuzz.mutations import (
    INTEGERS,
    TEXTS,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    odd_text,
    random_value,
    to_json,
)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A header of the right length with other entries; sometimes a wrong length, or data of another size."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1:
        return (rng.choice(INTEGERS) % 2**64).to_bytes(8, "little") + data[8:]
    if kind == 2:
        header = mutate_json(rng, header)
    elif kind == 3:
        header = odd_text(rng, header)
    else:
        try:
            entries = json_text.parse(header)
            header = to_json(_change_entries(rng, entries))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):  # damaged before
            header = mutate_bytes(rng, header)
    if rng.randrange(6) == 0:
        rest = mutate_bytes(rng, rest)
    return len(header).to_bytes(8, "little") + header + rest


def _change_entries(rng: random.Random, header: dict) -> dict:
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    kind = rng.randrange(9)
    if kind == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U4", "", None, [], {}, 4)
        )
    elif kind == 1:
        entry["shape"] = [-size for size in entry["shape"]]
    elif kind == 2:
        entry["shape"] = rng.choice(
            (
                [],
                [0],
                [1] * 70,
                [2**32, 2**32],
                [10**3000, 10**3000],
                [0, 2**62],
                [1.0],
                ["4"],
                "44",
                None,
                [True],
            )
        )
    elif kind == 3:  # overlaps with another
        entry["data_offsets"] = list(header[rng.choice(names)]["data_offsets"])
    elif kind == 4:
        entry["data_offsets"] = [
            offset + rng.choice((-1, 1, 4, 2**40)) for offset in entry["data_offsets"]
        ]
    elif kind == 5:
        entry["data_offsets"] = rng.choice(
            (
                [0],
                [],
                [0, 0, 0],
                [4, 0],
                [-4, 0],
                [0.0, 4.0],
                {"a": 1, "b": 2},
                "01",
                None,
                [0, 10**4000],
            )
        )
    elif kind == 6:
        header[rng.choice((*TEXTS, f"{name}x"))] = header.pop(name)
    elif kind == 7:
        header[name] = random_value(rng, 1)
    else:
        rng.choice((header, entry))["x"] = random_value(rng)
    return header


def _gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """(offset, bytes) of the numbers in a GGUF header: version, counts, lengths, types, values, shapes and offsets."""
    places: list[tuple[int, int]] = [(4, 4), (8, 8), (16, 8)]
    num_tensors, num_fields = struct.unpack_from("<QQ", data, 8)
    at = 24
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(width: int) -> int:
        nonlocal at
        if at + width > len(data):
            raise struct.error
        places.append((at, width))
        value = int.from_bytes(data[at : at + width], "little")
        at += width
        return value

    def text() -> None:
        nonlocal at
        length = number(8)
        if length:
            places.append((at, 1))
        at += length

    for _ in range(num_fields):
        text()
        kind = number(4)
        if kind == 8:
            text()
        elif kind == 9:
            item, count = number(4), number(8)
            if item == 8:
                for _ in range(count):
                    text()
            else:
                first = min(count, 4)
                for _ in range(first):
                    number(sizes[item])
                at += (count - first) * sizes[item]
        else:
            number(sizes[kind])
    for _ in range(num_tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return places


def mutate_gguf(rng: random.Random, data: bytes) -> bytes:
    """Another number in one to three fields of the header; sometimes any other change."""
    if rng.randrange(4) == 0:
        return mutate_bytes(rng, data)
    try:
        places = _gguf_fields(data)
    except (struct.error, KeyError):  # damaged before
        return mutate_bytes(rng, data)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, width = rng.choice(places)
        old = int.from_bytes(out[at : at + width], "little")
        floats = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-45)))
        new = rng.choice(
            (
                old + rng.choice((-1, 1)),
                rng.choice(INTEGERS),
                rng.randrange(16),
                int.from_bytes(floats, "little"),
                int.from_bytes(data[(other := rng.choice(places))[0] :][: other[1]], "little"),
            )
        )
        out[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(out)


def mutate_msgpack(rng: random.Random, data: bytes) -> bytes:
    """A tree of T5X with other leaves and keys; sometimes any other change."""
    if rng.randrange(4) == 0:
        return mutate_bytes(rng, data)
    try:
        tree = serialization.msgpack_restore(data)
        holder, key = rng.choice(_places(tree))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # damaged before
        return mutate_bytes(rng, data)
    kind = rng.randrange(9)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[rng.choice((*TEXTS, 3, None, True, b"x", 1.5))] = holder.pop(key)
    elif kind == 2:
        holder[key] = _deep(rng.choice((10, 400, 600, 990)))
    elif kind == 3:
        holder[key] = rng.choice(
            (
                np.zeros((0,)), np.zeros((3, 0)), np.float32(1), np.arange(6).reshape(2, 3), np.array("x"), np.array([True]),
                np.full((4, 4), np.nan, np.float32), np.zeros((1,) * 40, np.float32), 1 + 2j, b"bytes",
            )
        )  # fmt: skip
    elif kind == 4:
        holder[key] = {
            "__msgpack_chunked_array__": True,
            "shape": random_value(rng, 4),
            "chunks": {"0": np.ones(4)},
        }
    elif kind == 5:
        holder[key] = msgpack.ExtType(rng.choice((1, 2, 3, 4, 100)), _array_bytes(rng))
    else:
        holder[key] = random_value(
            rng, holder[key] if isinstance(holder[key], int | float | str) else None
        )
    if rng.randrange(8) == 0:
        tree = random_value(rng)
    try:
        return msgpack.packb(tree, default=serialization._msgpack_ext_pack, strict_types=True)
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
    ):  # numbers and texts that msgpack has not
        return mutate_bytes(rng, data)


def _array_bytes(rng: random.Random) -> bytes:
    """An array as flax packs it, with a shape, type or size that is wrong."""
    shape = rng.choice(((4,), (-1,), (2**40, 2**40), (0, 2**62), ("x",), 4, None, (3, 3), ()))
    dtype = rng.choice(
        (
            "float32",
            "object",
            "V8",
            "bfloat16",
            "S4",
            "M8[s]",
            "",
            "f4,f4",
            "no",
            5,
            None,
            "float128",
        )
    )
    return rng.choice((msgpack.packb((shape, dtype, bytes(16))), b"", b"\xc1", bytes(16)))


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def _places(tree: Any) -> list[tuple[dict, Any]]:
    found = []
    for key, value in tree.items():
        found.append((tree, key))
        if isinstance(value, dict):
            found += _places(value)
    return found


def mutate_spiece(rng: random.Random, data: bytes) -> bytes:
    """A SentencePiece model with other pieces and settings; sometimes any other change."""
    if rng.randrange(3) == 0:
        return mutate_bytes(rng, data)
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    except DecodeError:  # damaged before
        return mutate_bytes(rng, data)
    if not proto.pieces:
        return mutate_bytes(rng, data)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    piece = rng.choice(proto.pieces)
    small = rng.choice((-1, 0, 1, 2, 3, 119, 120, 2**31 - 1, -(2**31)))
    charsmap = normalizer.precompiled_charsmap
    text = rng.choice([text for text in TEXTS if text.isprintable() or "\ud800" not in text])
    kind = rng.randrange(9)
    if kind == 0:
        piece.piece = text
    elif kind == 1:
        piece.score = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1e30))
    elif kind == 2:
        piece.type = rng.choice((1, 2, 3, 4, 5, 6))
    elif kind == 3:
        piece.piece = rng.choice(proto.pieces).piece
    elif kind == 4:
        setattr(trainer, rng.choice(("unk_id", "eos_id", "bos_id", "pad_id", "vocab_size")), small)
    elif kind == 5:
        trainer.model_type = rng.choice((1, 2, 3, 4))
    elif kind == 6:
        for name in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
            setattr(normalizer, name, rng.random() < 0.5)
        trainer.byte_fallback = rng.random() < 0.5
        trainer.treat_whitespace_as_suffix = rng.random() < 0.2
    elif kind == 7:
        del proto.pieces[rng.randrange(len(proto.pieces)) :]
    else:
        normalizer.precompiled_charsmap = mutate_bytes(rng, charsmap or bytes(1024))
    return proto.SerializeToString()


Mutation = Callable[[random.Random, bytes], bytes]
# By a file's name or the end of it, the first that fits.
BY_NAME: tuple[tuple[str, Mutation], ...] = (
    (".safetensors", mutate_safetensors),
    (".gguf", mutate_gguf),
    (".jsonl", mutate_lines),
    ("spiece.model", mutate_spiece),
    (".json", mutate_json),
    (".zarray", mutate_json),
    ("checkpoint", mutate_msgpack),
)


def mutation_of(path: Path) -> Mutation:
    return next((found for end, found in BY_NAME if path.name.endswith(end)), mutate_bytes)
