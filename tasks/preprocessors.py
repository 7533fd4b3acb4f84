"""From a task's examples to token ids, in plain Python and as seqio preprocessors.

Both sides do the same three steps: render the prompt, tokenise `inputs` and `targets`, append eos
to the targets. A test holds them equal.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sira_jax.errors import DataError
from tasks.specs import Example
from tasks.templates import PromptTemplate
from tasks.vocabularies import Vocabulary

if TYPE_CHECKING:
    import tensorflow as tf

FEATURES = ("inputs", "targets")


def render_prompts(examples: Sequence[Example], template: PromptTemplate | None) -> list[Example]:
    """The examples with `inputs` rendered by the template; None leaves them as they are."""
    if template is None:
        return list(examples)
    return [{**example, "inputs": template.render(example["inputs"])} for example in examples]


def tokenize(
    examples: Sequence[Example], vocabulary: Vocabulary, *, eos_id: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of the inputs, and of the targets with eos at the end.

    Args:
      examples: with the fields `inputs` and `targets`.
      vocabulary: gives the ids.
      eos_id: the id at the end of a target; None takes the vocabulary's.

    Returns:
      One int32 array an example, for the inputs and for the targets.

    Raises:
      DataError: there is no eos id, or it is outside the vocabulary.
    """
    eos_id = vocabulary.eos_id if eos_id is None else eos_id
    if eos_id is None:
        raise DataError("the vocabulary has no eos token, which must end every target")
    if not 0 <= eos_id < vocabulary.vocab_size:
        raise DataError(f"eos_id={eos_id} is not allowed: 0 to {vocabulary.vocab_size - 1}")
    inputs, targets = (
        vocabulary.encode_batch([example[feature] for example in examples]) for feature in FEATURES
    )
    return (
        [np.asarray(ids, np.int32) for ids in inputs],
        [np.asarray([*ids, eos_id], np.int32) for ids in targets],
    )


def seqio_render_prompts(
    template: PromptTemplate,
) -> "Callable[[tf.data.Dataset], tf.data.Dataset]":
    """A seqio preprocessor that does `render_prompts`."""
    import tensorflow as tf

    def render(text: bytes) -> bytes:
        return template.render(text.decode("utf-8")).encode("utf-8")

    def render_example(example: dict) -> dict:
        prompt = tf.numpy_function(render, [example["inputs"]], tf.string, stateful=False)
        prompt.set_shape([])
        return {**example, "inputs": prompt}

    return lambda dataset: dataset.map(render_example, num_parallel_calls=tf.data.AUTOTUNE)
