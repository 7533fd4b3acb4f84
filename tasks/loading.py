"""Tasks and mixtures as arrays of token ids in memory, without TensorFlow."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sira_jax.errors import DataError
from tasks import specs
from tasks.mixtures import mixing_rates
from tasks.preprocessors import render_prompts, tokenize
from tasks.templates import PromptTemplate
from tasks.vocabularies import Vocabulary, as_vocabulary

if TYPE_CHECKING:
    import seqio


@dataclass(frozen=True)
class TokenizedTask:
    """A split of a task as token ids.

    Attributes:
      name: the task's name.
      split: the split's name.
      inputs: int32 ids of each prompt.
      targets: int32 ids of each target, eos included.
      examples: the texts: the rendered `inputs`, the `targets` and what else the metrics need.
      metrics: names in `tasks.metrics.METRICS`.
    """

    name: str
    split: str
    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    examples: Sequence[specs.Example]
    metrics: tuple[str, ...]

    def __post_init__(self):
        if not len(self.inputs) == len(self.targets) == len(self.examples):
            raise DataError(
                f"task {self.name}: {len(self.inputs)} inputs, {len(self.targets)} targets and "
                f"{len(self.examples)} examples"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def max_input_length(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.inputs))

    @property
    def max_target_length(self) -> int:
        """Tokens of the longest target, eos included."""
        return max(map(len, self.targets))

    def fingerprint(self) -> str:
        """A short text that changes with any token id."""
        digest = hashlib.blake2b(digest_size=8)
        for ids in (*self.inputs, *self.targets):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.astype("<i4").tobytes())
        return digest.hexdigest()

    def take(self, limit: int) -> "TokenizedTask":
        """The first `limit` examples."""
        return dataclasses.replace(
            self,
            inputs=self.inputs[:limit],
            targets=self.targets[:limit],
            examples=self.examples[:limit],
        )


def load_task(
    name: str,
    split: str,
    vocabulary: "Vocabulary | seqio.Vocabulary | str",
    *,
    limit: int | None = None,
    template: PromptTemplate | None = None,
    eos_id: int | None = None,
) -> TokenizedTask:
    """A split of a task as token ids, equal to what the seqio task of that name yields.

    Args:
      name: of a task.
      split: "train", "validation" or "test".
      vocabulary: a vocabulary of `tasks.vocabularies` or seqio, or the spec of one.
      limit: take only so many examples, the first ones.
      template: makes the prompt from the input text; None takes the text itself.
      eos_id: ends the targets; None takes the vocabulary's.

    Raises:
      DataError: unknown name or split, missing or damaged data, a bad vocabulary, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit!r} is not allowed: None or at least 1")
    spec = specs.get_task(name)
    examples = render_prompts(spec.examples(split)[:limit], template)
    inputs, targets = tokenize(examples, as_vocabulary(vocabulary), eos_id=eos_id)
    return TokenizedTask(name, split, inputs, targets, examples, spec.metrics)


def load_mixture(
    name: str,
    split: str,
    vocabulary: "Vocabulary | seqio.Vocabulary | str",
    *,
    limit: int | None = None,
    template: PromptTemplate | None = None,
    eos_id: int | None = None,
    mixing: str = "mixture",
    temperature: float = 1.0,
    maximum: int | None = None,
) -> tuple[list[TokenizedTask], list[float]]:
    """The tasks of a mixture with their rates; a task counts as a mixture of itself.

    Args:
      name: of a mixture or a task.
      split, vocabulary, limit, template, eos_id: see `load_task`; the limit is for each task.
      mixing, temperature, maximum: see `tasks.mixtures.mixing_rates`. "mixture" takes the mixture's
        own rates, those of the seqio mixture of that name.

    Raises:
      DataError, ConfigError: see `load_task` and `mixing_rates`.
    """
    members, own_rates = specs.members(name)
    vocabulary = as_vocabulary(vocabulary)
    tasks = [
        load_task(member.name, split, vocabulary, limit=limit, template=template, eos_id=eos_id)
        for member in members
    ]
    rates = mixing_rates(
        mixing,
        [len(task) for task in tasks],
        own_rates=own_rates,
        temperature=temperature,
        maximum=maximum,
    )
    return tasks, rates
