"""What a kind of model reads: one class for decoders, one for encoder-decoders, behind one interface.

Letters: B rows, S positions of the encoder, T of the decoder.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sira_jax.errors import DataError, check
from tasks.features import TOO_LONG_POLICIES, PlacedExample, make_example, pack_rows

# Feature -> type. The names are T5X's for encoder-decoder models, but for the task ids.
ENCODER_DTYPES: Mapping[str, type] = {
    "encoder_input_tokens": np.int32,
    "encoder_segment_ids": np.int32,
    "encoder_positions": np.int32,
    "encoder_task_ids": np.int32,
}


class FeatureConverter(abc.ABC):
    """Makes examples of token ids and writes rows of them as a model's features."""

    @property
    @abc.abstractmethod
    def limits(self) -> tuple[int, ...]:
        """Positions of a row on each side of the model."""

    @abc.abstractmethod
    def make_example(
        self, inputs: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, too_long: str
    ) -> tuple[Any, bool] | None:
        """(example, whether its prompt was cut), or None where it is dropped.

        Args:
          inputs: ids of the prompt.
          targets: ids of the target, eos included.
          too_long: what happens to an example that fits in no row, see `tasks.features.make_example`.

        Raises:
          DataError: no target, no token before it, or too long under "error".
          ConfigError: an unknown policy.
        """

    @abc.abstractmethod
    def lengths(self, example: Any) -> tuple[int, ...]:
        """Positions that an example takes on each side."""

    @abc.abstractmethod
    def pack_rows(self, rows: Sequence[Sequence[PlacedExample]]) -> dict[str, np.ndarray]:
        """The features of B rows of examples."""

    @abc.abstractmethod
    def prompt(self, inputs: Sequence[int] | np.ndarray) -> list[int]:
        """The ids that a model reads before it generates."""

    @abc.abstractmethod
    def prompt_room(self, max_positions: int, new_tokens: int) -> int:
        """Ids of the longest prompt, without what `prompt` adds, of a model with so many positions.

        Args:
          max_positions: of the model.
          new_tokens: most tokens to be generated.
        """

    @abc.abstractmethod
    def signature(self) -> dict[str, Any]:
        """What the batches depend on, in values fit for JSON."""


@dataclass(frozen=True, kw_only=True)
class DecoderFeatures(FeatureConverter):
    """Prompt and target one after another in the rows of a decoder: `tasks.features`.

    Attributes:
      length: T, positions of a row.
      bos_id: put before each prompt.
      pad_id: the token at padded positions.
    """

    length: int
    bos_id: int | None = None
    pad_id: int = 0

    def __post_init__(self):
        check(self.length >= 1, "length", self.length, "at least 1")

    @property
    def limits(self) -> tuple[int, ...]:
        return (self.length,)

    def make_example(self, inputs, targets, too_long):
        example = make_example(
            inputs, targets, length=self.length, too_long=too_long, bos_id=self.bos_id
        )
        if example is None:
            return None
        return example, example.num_prompt < len(inputs) + (self.bos_id is not None)

    def lengths(self, example: Any) -> tuple[int, ...]:
        return (len(example),)

    def pack_rows(self, rows: Sequence[Sequence[PlacedExample]]) -> dict[str, np.ndarray]:
        return pack_rows(rows, self.length, pad_id=self.pad_id)

    def prompt(self, inputs: Sequence[int] | np.ndarray) -> list[int]:
        return [*([] if self.bos_id is None else [self.bos_id]), *map(int, inputs)]

    def prompt_room(self, max_positions: int, new_tokens: int) -> int:
        return min(self.length, max_positions - new_tokens) - (self.bos_id is not None)

    def signature(self) -> dict[str, Any]:
        return {"length": self.length, "bos_id": self.bos_id}


@dataclass(frozen=True)
class PairExample:
    """One example as an encoder-decoder sees it.

    Attributes:
      inputs: int32 (m,), what the encoder reads, m >= 1.
      targets: int32 (n,), what the decoder predicts, n >= 1.
    """

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderFeatures(FeatureConverter):
    """The prompt in the rows of an encoder, the target in those of a decoder.

    The decoder reads `start_id` and the target without its last token, and predicts the target; every token of it counts
    in the loss. Examples that share a row have the segment ids 1, 2, ... on both sides, 0 is padding.

    Attributes:
      length: S, positions of the encoder's rows.
      target_length: T, positions of the decoder's.
      eos_id: put after each prompt, as T5 was trained; None puts nothing.
      start_id: the token that the decoder reads first.
      pad_id: the token at padded positions.
    """

    length: int
    target_length: int
    eos_id: int | None = None
    start_id: int = 0
    pad_id: int = 0

    def __post_init__(self):
        for name in ("length", "target_length"):
            value = getattr(self, name)
            check(value >= 1, name, value, "at least 1")

    @property
    def limits(self) -> tuple[int, ...]:
        return (self.length, self.target_length)

    def make_example(self, inputs, targets, too_long):
        """A longer prompt is cut on its left under "truncate_inputs", a longer target drops the example."""
        check(too_long in TOO_LONG_POLICIES, "too_long", too_long, "/".join(TOO_LONG_POLICIES))
        eos = np.asarray([] if self.eos_id is None else [self.eos_id], np.int32)
        inputs, targets = np.asarray(inputs, np.int32), np.asarray(targets, np.int32)
        if len(targets) == 0:
            raise DataError("an example without target tokens: append eos to the targets")
        if len(inputs) + len(eos) == 0:
            raise DataError("an example without a token for the encoder: use a prompt template")
        sizes = (len(inputs) + len(eos), len(targets))
        names = ("length", "target_length")
        if too_long == "error":
            for name, size, limit in zip(names, sizes, self.limits, strict=True):
                if size > limit:
                    raise DataError(
                        f"an example takes {size} positions, more than {name}={limit}: raise it, or set"
                        " too_long to drop or truncate_inputs"
                    )
        excess = max(0, sizes[0] - self.length)
        is_lost = excess and (too_long == "drop" or excess > len(inputs))
        if sizes[1] > self.target_length or is_lost:
            return None
        return PairExample(np.concatenate([inputs[excess:], eos]), targets), excess > 0

    def lengths(self, example: Any) -> tuple[int, ...]:
        return len(example.inputs), len(example.targets)

    def pack_rows(self, rows: Sequence[Sequence[PlacedExample]]) -> dict[str, np.ndarray]:
        """`encoder_*` features (B, S) and those of FEATURE_DTYPES (B, T). At padding, all but tokens is 0.

        Raises:
          DataError: the examples of a row take more positions than it has.
        """
        prompts = [[(item.example.inputs, item.task_id) for item in placed] for placed in rows]
        targets = [[(item.example.targets, item.task_id) for item in placed] for placed in rows]
        encoder = self._write(prompts, self.length)
        decoder = self._write(targets, self.target_length)
        is_real = decoder["segment_ids"] > 0
        before = np.roll(decoder["tokens"], 1, axis=1)
        read = np.where(decoder["positions"] == 0, self.start_id, before)
        return {
            "encoder_input_tokens": encoder["tokens"],
            "encoder_segment_ids": encoder["segment_ids"],
            "encoder_positions": encoder["positions"],
            "encoder_task_ids": encoder["task_ids"],
            "decoder_input_tokens": np.where(is_real, read, self.pad_id).astype(np.int32),
            "decoder_target_tokens": decoder["tokens"],
            "decoder_loss_weights": is_real.astype(np.float32),
            "decoder_segment_ids": decoder["segment_ids"],
            "decoder_positions": decoder["positions"],
            "task_ids": decoder["task_ids"],
        }

    def _write(
        self, rows: Sequence[Sequence[tuple[np.ndarray, int]]], length: int
    ) -> dict[str, np.ndarray]:
        """One side's arrays (B, `length`)."""
        names = ("tokens", "segment_ids", "positions", "task_ids")
        arrays = {name: np.zeros((len(rows), length), np.int32) for name in names}
        arrays["tokens"][:] = self.pad_id
        for row, items in enumerate(rows):
            start = 0
            for segment, (tokens, task_id) in enumerate(items, start=1):
                end = start + len(tokens)
                if end > length:
                    raise DataError(f"row {row} takes {end} positions, more than {length}")
                at = (row, slice(start, end))
                arrays["tokens"][at] = tokens
                arrays["segment_ids"][at] = segment
                arrays["positions"][at] = np.arange(len(tokens))
                arrays["task_ids"][at] = task_id
                start = end
        return arrays

    def prompt(self, inputs: Sequence[int] | np.ndarray) -> list[int]:
        return [*map(int, inputs), *([] if self.eos_id is None else [self.eos_id])]

    def prompt_room(self, max_positions: int, new_tokens: int) -> int:
        return min(self.length, max_positions) - (self.eos_id is not None)

    def signature(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "target_length": self.target_length,
            "eos_id": self.eos_id,
            "start_id": self.start_id,
        }
