"""Small SeqIO tasks that hold their examples in memory; importing registers them, which gin files do by name."""

import functools

import numpy as np
import seqio
import tensorflow as tf

VOCABULARY = seqio.ByteVocabulary()
WORDS = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jolly")
SPLITS = {"train": 48, "validation": 8, "test": 8}
FEATURES = {
    "inputs": seqio.Feature(VOCABULARY, add_eos=True, dtype=tf.int32),
    "targets": seqio.Feature(VOCABULARY, add_eos=True, dtype=tf.int32),
}


def examples(kind, split):
    """Two words, and what the task makes of them; which words depends on the split alone."""
    order = np.random.default_rng(sorted(SPLITS).index(split))
    for _ in range(SPLITS[split]):
        text = " ".join(order.choice(WORDS, 2))
        yield {"inputs": f"{kind}: {text}", "targets": KINDS[kind](text)}


KINDS = {"reverse": lambda text: text[::-1], "first": lambda text: text.split()[0]}


def _dataset(split, shuffle_files, seed=None, *, kind):
    del shuffle_files, seed
    rows = list(examples(kind, split))
    return tf.data.Dataset.from_tensor_slices(
        {name: [row[name] for row in rows] for name in ("inputs", "targets")}
    )


def exact_match(targets, predictions):
    right = sum(target == guess for target, guess in zip(targets, predictions, strict=True))
    return {"exact_match": 100 * right / len(targets)}


for _kind in KINDS:
    seqio.TaskRegistry.add(
        f"tiny_{_kind}",
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, kind=_kind),
            splits=list(SPLITS),
            num_input_examples=SPLITS,
        ),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=FEATURES,
        metric_fns=[exact_match],
    )

seqio.MixtureRegistry.add("tiny_mixture", [("tiny_reverse", 1.0), ("tiny_first", 1.0)])
