"""Damages bytes, JSON values and folders at random; everything follows from the generator it is given."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sira_jax import json_text

# Lengths, counts and offsets that a reader may trust too much.
INTEGERS = (
    0, 1, 2, 3, 7, 31, 64, 127, 128, 255, 256, 1000, 65535, 65536, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
    2**48, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, -1, -2, -128, -(2**31), -(2**63), -(10**30),
)  # fmt: skip
FLOATS = (
    0.0,
    -0.0,
    0.5,
    1.5,
    -1.0,
    1e-45,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
)
# NUL, a lone surrogate, line ends, control characters, paths that lead elsewhere, and patterns.
TEXTS = (
    "", " ", "x", "0", "-1", "1e999", "\0", "a\0b", "\ud800", "a\nb", "\r\n", "\x1b[31m", "\u2028", "ünï", "None", "null",
    ".", "..", "../../x", "/etc/passwd", "../outside", "../outside/model.safetensors", "a/b", "~", "model.safetensors",
    "F64", "I64", "F8_E4M3", "float32", "bfloat16", "llama", "t5", "lora", "sira", "[", "(a+)+$", "a{99999999999}", ".*",
    "{{ 1 / 0 }}", "{% for i in range(9**9) %}{% endfor %}", "x" * 5000,
)  # fmt: skip
DEPTHS = (50, 900, 1100, 100_000)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes, more often near the beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        out = _change_bytes(rng, out)
    return bytes(out)


def _place(rng: random.Random, size: int) -> int:
    if size <= 1:
        return 0
    reach = rng.choice((16, 64, 256, 1024, size))
    return rng.randrange(min(reach, size))


def _change_bytes(rng: random.Random, out: bytearray) -> bytearray:
    at = _place(rng, len(out))
    length = rng.choice((1, 2, 4, 8, 16, 100, 1000, 5000))
    kind = rng.randrange(11)
    if kind == 0 and out:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and out:
        out[at] = rng.choice((0, 1, 0x0A, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:  # a length field
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(INTEGERS) % 2 ** (8 * width)
        out[at : at + width] = number.to_bytes(width, rng.choice(("little", "little", "big")))
    elif kind == 3:
        del out[at:]
    elif kind == 4:
        del out[at : at + length]
    elif kind == 5:  # twice
        out[at:at] = out[at : at + length]
    elif kind == 6:  # a piece of another place
        other = _place(rng, len(out))
        out[at : at + length] = out[other : other + length]
    elif kind == 7:
        out[at : at + length] = bytes(min(length, len(out) - at))
    elif kind == 8:
        out += rng.randbytes(length)
    elif kind == 9:  # digits in a text
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", out))
        if numbers:
            match = rng.choice(numbers[:200])
            text = rng.choice((b"9" * 5000, b"-1", b"1e999", b"NaN", b"0x10", b"1" + b"0" * 30))
            out[match.start() : match.end()] = text
    else:
        out[at : at + length] = rng.randbytes(length)
    return out


def mutate_json(rng: random.Random, text: bytes) -> bytes:
    """Changes values, keys and structure of a JSON text; sometimes its bytes."""
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(rng, text)
    if kind == 1:
        return odd_text(rng, text)
    try:
        value = json_text.parse(text)
    except ValueError:  # damaged before
        return mutate_bytes(rng, text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutate_value(rng, value)
    out = to_json(value)
    if kind == 2:
        out = _insert_into(rng, out)
    return out


def to_json(value: Any) -> bytes:
    """JSON with whatever Python's writer can be made to write: NaN, lone surrogates, huge numbers."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def odd_text(rng: random.Random, text: bytes) -> bytes:
    depth = rng.choice(DEPTHS)
    return rng.choice(
        (
            lambda: b"",
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.decode("utf-8", "replace").encode("utf-16"),
            lambda: text + text,
            lambda: text[: len(text) // 2],
            lambda: b"[" * depth,
            lambda: b"[" * depth + b"]" * depth,
            lambda: b'{"a":' * depth + b"1" + b"}" * depth,
            lambda: b"[" + text + b"]",
            lambda: rng.choice((b"null", b"1", b'"x"', b"[]", b"{}", b"NaN", b"9" * 5000)),
        )
    )()


def _insert_into(rng: random.Random, text: bytes) -> bytes:
    """What a parsed value cannot express: duplicate keys, deep nesting and numbers of many digits in a place."""
    colons = [match.start() for match in re.finditer(rb'": ', text)]
    if not colons:
        return text
    at = rng.choice(colons)
    start = text.rfind(b'"', 0, at)
    key = text[start : at + 2]
    depth = rng.choice(DEPTHS)
    return rng.choice(
        (
            text[:start] + key + b" 1, " + text[start:],
            text[:start] + key + b" null, " + text[start:],
            text[:start] + key + b" " + b"9" * 5000 + b", " + text[start:],
            text[: at + 3] + b"9" * 4200 + text[at + 3 :].lstrip(b"0123456789.-"),
            text[: at + 3] + b"[" * depth + b"]" * depth + b', "z": ' + text[at + 3 :],
            text[: at + 3] + b'{"a":' * depth + b"1" + b"}" * depth + b', "z": ' + text[at + 3 :],
        )
    )


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 20)):
            found += _paths(value[index], (*path, index))
    return found


def random_value(rng: random.Random, old: Any = None) -> Any:
    """A value of any type, more often one close to the old."""
    kind = rng.randrange(9)
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    if kind == 0 and is_number:
        return old + rng.choice((-1, 1))
    if kind <= 2 and is_number:
        return rng.choice(INTEGERS)
    if kind == 3:
        return rng.choice(INTEGERS)
    if kind == 4:
        return rng.choice(FLOATS)
    if kind == 5 or (kind <= 2 and isinstance(old, str)):
        return rng.choice(TEXTS)
    if kind == 6:
        return rng.choice((None, True, False, [], {}, [[]], [None], [0], {"": 0}, [1, "x", None]))
    if kind == 7:
        return rng.choice(([old], {"a": old}, [old, old], str(old), [old] * 70))
    return rng.choice((None, True, False))


def mutate_value(rng: random.Random, value: Any) -> Any:
    """The value with one change somewhere in it."""
    value = json.loads(json.dumps(value))
    path = rng.choice(_paths(value))
    if not path:
        return random_value(rng, value) if rng.randrange(8) == 0 else value
    *above, last = path
    holder = value
    for step in above:
        holder = holder[step]
    old = holder[last]
    kind = rng.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        del holder[last]
        holder[rng.choice((*TEXTS, str(last) + "x", str(last).upper()))] = old
    elif kind == 2 and isinstance(holder, list):
        holder.insert(last, old)
    elif kind == 3:  # the value of another place
        other: Any = value
        for step in rng.choice(_paths(value)):
            other = other[step]
        holder[last] = json.loads(json.dumps(other))
    else:
        holder[last] = random_value(rng, old)
    return value


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON objects, one a line: one line, or the order and number of lines."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1:
        lines[at] = lines[at].replace(b" ", "\u2028".encode())
    elif kind == 2:
        lines = [line for line in lines for _ in range(rng.choice((0, 1, 2)))]
    elif kind == 3:
        return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\0", b"")))
    else:
        lines[at] = mutate_json(rng, lines[at])
    return b"\n".join(lines)


# Changes of a folder's entries that are no change of a file's bytes.


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _replace_by(make: Callable[[Path, Path], None]) -> Callable[[random.Random, Path, Path], None]:
    def change(rng: random.Random, path: Path, folder: Path) -> None:
        path.unlink()
        make(path, folder)

    return change


def _swap(rng: random.Random, path: Path, folder: Path) -> None:
    other = rng.choice(_files(folder))
    if other != path:
        shutil.copyfile(other, path)


def _rename(rng: random.Random, path: Path, folder: Path) -> None:
    path.rename(
        path.with_name(rng.choice(("x", path.name.upper(), f".{path.name}", f"{path.name}.bin")))
    )


ENTRY_CHANGES: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "gone": _replace_by(lambda path, folder: None),
    "empty": _replace_by(lambda path, folder: path.touch()),
    "a folder": _replace_by(lambda path, folder: path.mkdir()),
    "a pipe": _replace_by(lambda path, folder: os.mkfifo(path)),
    "a link to itself": _replace_by(lambda path, folder: path.symlink_to(path.name)),
    "a link to nothing": _replace_by(lambda path, folder: path.symlink_to("nowhere")),
    "a link to the folder": _replace_by(lambda path, folder: path.symlink_to(folder)),
    "an endless device": _replace_by(lambda path, folder: path.symlink_to("/dev/zero")),
    "an empty device": _replace_by(lambda path, folder: path.symlink_to("/dev/null")),
    "another file": _swap,
    "renamed": _rename,
}


def change_entry(rng: random.Random, path: Path, folder: Path) -> str:
    """Puts something else in the place of a file; returns what."""
    name = rng.choice(list(ENTRY_CHANGES))
    ENTRY_CHANGES[name](rng, path, folder)
    return name
