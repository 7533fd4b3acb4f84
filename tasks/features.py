"""From token ids to the features of a model: examples for a decoder alone, placing and packing them in rows.

Letters: B rows, T positions.

An example is the token sequence t_0 .. t_n = [bos] + inputs + targets. The model reads t_0 ..
t_{n-1} and predicts t_1 .. t_n: n positions, no token invented between examples. The loss counts
where the predicted token belongs to the targets (eos included), so that the last prompt token
predicts the first target token.

Several examples share a row of T positions. Each has its own segment id (1, 2, ... within a row, 0
is padding) and its positions start at 0, so that a model that attends only within a segment and
takes positions from here computes for each example what it computes for the example alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sira_jax.errors import DataError, check

TOO_LONG_POLICIES = ("error", "drop", "truncate_inputs")

# Feature -> type; all are (B, T). The names are T5X's for decoder-only models.
FEATURE_DTYPES: Mapping[str, type] = {
    "decoder_input_tokens": np.int32,
    "decoder_target_tokens": np.int32,
    "decoder_loss_weights": np.float32,
    "decoder_segment_ids": np.int32,
    "decoder_positions": np.int32,
    "task_ids": np.int32,
}


@dataclass(frozen=True)
class LmExample:
    """One example as a decoder-only model sees it.

    Attributes:
      tokens: int32 (n + 1,), prompt then target.
      num_prompt: number of tokens of the prompt, bos included; 1 to n.
    """

    tokens: np.ndarray
    num_prompt: int

    def __len__(self) -> int:
        """Positions it takes in a row: n."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class PlacedExample:
    """An example in a row.

    Attributes:
      example: an LmExample, or what another converter makes (see `tasks.converters`).
      task_id: index of its task.
    """

    example: Any
    task_id: int = 0


def make_example(
    inputs: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
    *,
    length: int | None = None,
    too_long: str = "error",
    bos_id: int | None = None,
) -> LmExample | None:
    """Joins prompt and target.

    Args:
      inputs: ids of the prompt.
      targets: ids of the target, eos included.
      length: T, the positions of a row; None has no limit.
      too_long: what happens to a longer example. "error" raises; "drop" gives None;
        "truncate_inputs" cuts the prompt on its left (bos stays) and never the target, or gives
        None where the target leaves it no token.
      bos_id: put before the prompt.

    Returns:
      The example, or None where it is dropped.

    Raises:
      DataError: no target, no token before the target, or too long under "error".
      ConfigError: an unknown policy.
    """
    check(too_long in TOO_LONG_POLICIES, "too_long", too_long, "/".join(TOO_LONG_POLICIES))
    bos = np.asarray([] if bos_id is None else [bos_id], np.int32)
    inputs, targets = np.asarray(inputs, np.int32), np.asarray(targets, np.int32)
    if len(targets) == 0:
        raise DataError("an example without target tokens: append eos to the targets")
    if len(bos) + len(inputs) == 0:
        raise DataError(
            "an example without a token before its target, whose first token nothing predicts: "
            "use a prompt template or add_bos"
        )
    excess = 0 if length is None else len(bos) + len(inputs) + len(targets) - (length + 1)
    if excess > 0:
        if too_long == "error":
            raise DataError(
                f"an example takes {length + excess} positions, more than length={length}: raise "
                "the length, or set too_long to drop or truncate_inputs"
            )
        if too_long == "drop" or excess > len(inputs) - (0 if len(bos) else 1):
            return None
        inputs = inputs[excess:]
    return LmExample(np.concatenate([bos, inputs, targets]), len(bos) + len(inputs))


def first_fit(
    lengths: Iterable[int | Sequence[int]], num_rows: int, length: int | Sequence[int]
) -> list[int]:
    """Rows of the first examples; the first example that fits nowhere ends the list.

    Each example goes into the first row with room for it.

    Args:
      lengths: positions that each example takes, a number or one for each side of the model.
      num_rows: B.
      length: T, of each side.

    Returns:
      The row of each placed example, at most one an example.
    """
    limits = np.atleast_1d(length)
    used = np.zeros((num_rows, len(limits)), np.int64)
    rows: list[int] = []
    for positions in lengths:
        fits = (used + positions <= limits).all(axis=1)
        if not fits.any():
            break
        row = int(np.argmax(fits))
        used[row] += positions
        rows.append(row)
    return rows


def pack_rows(
    rows: Sequence[Sequence[PlacedExample]], length: int, *, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Writes rows of examples as features.

    Args:
      rows: the examples of each of the B rows, in their order.
      length: T.
      pad_id: the token at padded positions.

    Returns:
      The features of FEATURE_DTYPES, (B, T). At padding, tokens are `pad_id` and all else is 0.

    Raises:
      DataError: the examples of a row take more than `length` positions.
    """
    batch = {name: np.zeros((len(rows), length), dtype) for name, dtype in FEATURE_DTYPES.items()}
    batch["decoder_input_tokens"][:] = pad_id
    batch["decoder_target_tokens"][:] = pad_id
    for row, placed in enumerate(rows):
        start = 0
        for segment, item in enumerate(placed, start=1):
            n = len(item.example)
            at = (row, slice(start, start + n))
            if start + n > length:
                raise DataError(f"row {row} takes {start + n} positions, more than {length}")
            batch["decoder_input_tokens"][at] = item.example.tokens[:-1]
            batch["decoder_target_tokens"][at] = item.example.tokens[1:]
            batch["decoder_loss_weights"][at] = np.arange(1, n + 1) >= item.example.num_prompt
            batch["decoder_segment_ids"][at] = segment
            batch["decoder_positions"][at] = np.arange(n)
            batch["task_ids"][at] = item.task_id
            start += n
    return batch


def unpack(batch: Mapping[str, np.ndarray]) -> list[list[PlacedExample]]:
    """The rows that `pack_rows` wrote."""
    rows: list[list[PlacedExample]] = []
    for row, segments in enumerate(batch["decoder_segment_ids"]):
        placed = []
        for segment in range(1, int(segments.max(initial=0)) + 1):
            at = (row, segments == segment)
            targets = batch["decoder_target_tokens"][at]
            tokens = np.concatenate([batch["decoder_input_tokens"][at][:1], targets])
            num_prompt = 1 + int(np.argmax(batch["decoder_loss_weights"][at] > 0))
            example = LmExample(tokens, num_prompt)
            placed.append(PlacedExample(example, int(batch["task_ids"][at][0])))
        rows.append(placed)
    return rows
