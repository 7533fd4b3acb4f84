"""Reading JSON that others wrote: whatever is wrong with a text is one kind of error."""

import json
import re
from typing import Any

# Of lists and objects in one another: no file that is read here has more than ten. Far deeper values exhaust the stack of
# whoever walks through them, or shows them in a message.
MOST_NESTED = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: UTF-8, UTF-16 or UTF-32 where it is bytes, as JSON allows.
      unique_keys: refuse an object that has a key twice, of which otherwise the last counts.

    Raises:
      ValueError: the text is no JSON, is nested too deeply, has a number of thousands of digits, or a text in it is none,
        as half of a pair of surrogates stands in it. json.JSONDecodeError, with the line, where that is the reason.
    """
    hook = _object_of_unique_keys if unique_keys else None
    if isinstance(text, bytes):  # json itself would let halves of pairs of surrogates pass
        text = text.decode(json.detect_encoding(text))
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError(f"more than {MOST_NESTED} lists and objects in one another") from None
    if _SURROGATE.search(text):
        _check_text(json.dumps(value, ensure_ascii=False))
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            part
            for holder in level
            if isinstance(holder, dict | list)
            for part in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return value
    raise ValueError(f"more than {MOST_NESTED} lists and objects in one another")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(f"{half} is half of a pair of surrogates") from None


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
