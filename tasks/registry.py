"""The tasks in seqio's registries. Importing this module imports TensorFlow and registers them all.

Every task and mixture of `tasks.specs` becomes a seqio Task or Mixture of the same name, with the
byte vocabulary, so that `seqio.get_mixture_or_task(name)` (and T5X by name) finds it. `bind` gives
the same task with another vocabulary or a prompt template and leaves the registries alone unless it
is told a name to register.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from sira_jax.errors import DataError
from tasks import specs
from tasks.metrics import METRICS
from tasks.preprocessors import FEATURES, seqio_render_prompts
from tasks.templates import PromptTemplate
from tasks.vocabularies import Vocabulary, as_vocabulary

DEFAULT_VOCABULARY = "bytes"


def _dataset_fn(spec: specs.TaskSpec) -> Callable[..., tf.data.Dataset]:
    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        examples = spec.examples(split)
        if shuffle_files:
            order = np.random.default_rng(None if seed is None else int(seed))
            examples = [examples[i] for i in order.permutation(len(examples))]
        fields = (*FEATURES, *spec.extra_fields)
        columns = {field: [example[field] for example in examples] for field in fields}
        return tf.data.Dataset.from_tensor_slices(columns)

    return dataset_fn


class _Source(seqio.FunctionDataSource):
    """The examples of a task, whose sizes, where not declared, are counted when seqio asks and not before."""

    def __init__(self, spec: specs.TaskSpec):
        super().__init__(_dataset_fn(spec), splits=tuple(spec.sizes))
        self._spec = spec
        self._sizes: dict[str, int] = {}

    def num_input_examples(self, split: str) -> int:
        """Raises DataError for a split the task has not, and where a file it must count is missing."""
        if split not in self._sizes:
            self._sizes[split] = self._spec.size(split)
        return self._sizes[split]


def _metric_fn(name: str) -> Callable[..., dict[str, float]]:
    # seqio reads the argument names, and passes them in this order.
    def metric_fn(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
        return METRICS[name](predictions, targets)

    metric_fn.__name__ = metric_fn.__qualname__ = name
    return metric_fn


def _postprocess_fn(spec: specs.TaskSpec) -> Callable[..., Any]:
    def postprocess(
        text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
    ) -> str | dict[str, str]:
        """A prediction as it is; a target as the example its metrics need."""
        if not is_target or example is None:
            return text
        fields = {"targets": "targets_pretokenized", **{f: f for f in spec.extra_fields}}
        return {name: tf.compat.as_text(example[key]) for name, key in fields.items()}

    return postprocess


def _make_task(
    spec: specs.TaskSpec,
    vocabulary: seqio.Vocabulary,
    template: PromptTemplate | None,
    name: str,
    inputs_eos: bool = False,
) -> seqio.Task:
    preprocessors = [
        *([] if template is None else [seqio_render_prompts(template)]),
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ]
    return seqio.Task(
        name,
        _Source(spec),
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=inputs_eos, dtype=tf.int32),
            "targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32),
        },
        preprocessors=preprocessors,
        postprocess_fn=_postprocess_fn(spec),
        metric_fns=[_metric_fn(metric) for metric in spec.metrics],
    )


def _make_provider(
    name: str,
    vocabulary: seqio.Vocabulary,
    template: PromptTemplate | None,
    new_name: str,
    inputs_eos: bool,
) -> seqio.Task | seqio.Mixture:
    if name in specs.TASKS:
        return _make_task(specs.TASKS[name], vocabulary, template, new_name, inputs_eos)
    tasks, rates = specs.members(name)
    members = [_make_task(task, vocabulary, template, task.name, inputs_eos) for task in tasks]
    return seqio.Mixture(new_name, list(zip(members, rates, strict=True)))


# Providers that `bind` made, by all that tells them apart.
_BOUND: dict[tuple, seqio.Task | seqio.Mixture] = {}


def bind(
    name: str,
    vocabulary: Vocabulary | seqio.Vocabulary | str,
    *,
    template: PromptTemplate | None = None,
    inputs_eos: bool = False,
    register_as: str | None = None,
) -> seqio.Task | seqio.Mixture:
    """A task or mixture with another vocabulary.

    The registries are not touched: `seqio.get_mixture_or_task(name)` still gives the byte version.
    Calls with equal arguments give the same object.

    Args:
      name: of a task or a mixture.
      vocabulary: of `tasks.vocabularies` or seqio, or the spec of one.
      template: makes the prompt from the input text; hashable.
      inputs_eos: the inputs end with eos too, as the encoder of a T5 was trained.
      register_as: puts the result into seqio's registry under this new name, for use by name. Doing
        so again with equal arguments changes nothing.

    Raises:
      DataError: unknown name, a bad vocabulary, or `register_as` is taken by something else.
    """
    specs.members(name)
    vocabulary = as_vocabulary(vocabulary)
    key = (name, vocabulary.fingerprint(), template, inputs_eos, register_as)
    if key not in _BOUND:
        new_name = register_as or name
        _BOUND[key] = _make_provider(name, vocabulary.to_seqio(), template, new_name, inputs_eos)
    provider = _BOUND[key]
    if register_as is not None:
        _register(register_as, provider)
    return provider


def _register(name: str, provider: seqio.Task | seqio.Mixture) -> None:
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        if name in registry.names():
            if registry.get(name) is provider:
                return
            raise DataError(f"register_as={name!r}: seqio already has another task of that name")
    is_task = isinstance(provider, seqio.Task)
    (seqio.TaskRegistry if is_task else seqio.MixtureRegistry).add_provider(name, provider)


def register_all() -> None:
    """Puts every task and mixture that is not there yet into seqio's registries."""
    vocabulary = as_vocabulary(DEFAULT_VOCABULARY).to_seqio()
    for spec in specs.TASKS.values():
        if spec.name not in seqio.TaskRegistry.names():
            task = _make_task(spec, vocabulary, None, spec.name)
            seqio.TaskRegistry.add_provider(spec.name, task)
    for mixture in specs.MIXTURES.values():
        if mixture.name not in seqio.MixtureRegistry.names():
            rates = list(zip(mixture.tasks, mixture.rates, strict=True))
            seqio.MixtureRegistry.add_provider(mixture.name, seqio.Mixture(mixture.name, rates))


register_all()
