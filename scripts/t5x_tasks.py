"""Tasks by name for the gin files of T5X: this project's with the model's vocabulary, and any others that SeqIO knows."""

import difflib

import seqio

from sira_jax.errors import DataError
from tasks import registry, specs


def with_vocabulary(name: str, vocabulary: seqio.Vocabulary, inputs_eos: bool = False) -> str:
    """The name under which SeqIO has the task or mixture `name` with this vocabulary.

    A task of this project that is registered with another vocabulary is registered once more, as NAME__ and the kind and size
    of the vocabulary. Any other task keeps its own vocabulary, which T5X compares with the model's.

    Args:
      name: of the task.
      vocabulary: the model's.
      inputs_eos: this project's tasks end their inputs with eos, as an encoder reads them.

    Raises:
      DataError: there is no such task.
    """
    known = (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(
            f"MIXTURE_OR_TASK_NAME={name!r}: no such task; {hint}a task of your own is imported in a gin file;"
            " scripts/show_task.py --list names this project's"
        )
    if name not in (*specs.TASKS, *specs.MIXTURES):
        return name
    bound, count = name, 1
    while bound in known and not _has(bound, vocabulary, inputs_eos):
        bound = f"{name}__{type(vocabulary).__name__}_{vocabulary.vocab_size}"
        bound += "" if count == 1 else f"_{count}"
        count += 1
    if bound not in known:
        registry.bind(name, vocabulary, inputs_eos=inputs_eos, register_as=bound)
    return bound


def _has(name: str, vocabulary: seqio.Vocabulary, inputs_eos: bool) -> bool:
    features = seqio.get_mixture_or_task(name).output_features
    is_same = all(feature.vocabulary == vocabulary for feature in features.values())
    return is_same and features["inputs"].add_eos == inputs_eos
