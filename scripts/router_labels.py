"""What a router's choices are held against: the task of a token's example, or what the token is; and the same shuffled.

Every labelling goes into a batch's task ids, by which the routers count, whatever it means.
Axis letters: B rows, T positions.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.vocabularies import Vocabulary

Batch = Mapping[str, Any]
KINDS = ("number", "punctuation", "space", "Latin letters", "other letters", "other")
# Names of tokens, segments and labels in a batch, for each stack that a model may have.
_STREAMS = (
    ("decoder_input_tokens", "decoder_segment_ids", "task_ids"),
    ("encoder_input_tokens", "encoder_segment_ids", "encoder_task_ids"),
)


def streams(batch: Batch) -> list[tuple[str, str, str]]:
    """The names of each stack that the batch has."""
    return [names for names in _STREAMS if names[0] in batch]


def token_counts(batches: Sequence[Batch]) -> list[int]:
    """Number of tokens, padding aside, that each stack reads."""
    return [
        sum(int(np.count_nonzero(batch[segments])) for batch in batches)
        for _, segments, _ in streams(batches[0])
    ]


def shuffle_examples(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The labels of whole examples dealt out anew among the examples: what a router tells of these, it tells by chance."""
    units, labels = [], []
    _, segments, names = _STREAMS[0]
    for number, batch in enumerate(batches):
        for row, own in enumerate(np.asarray(batch[segments])):
            for segment in np.unique(own[own > 0]):
                units.append((number, row, segment))
                labels.append(np.asarray(batch[names])[row][own == segment][0])
    dealt = np.random.default_rng(seed).permutation(labels)
    changed = [dict(batch) for batch in batches]
    for batch in changed:
        for _, _, name in streams(batch):
            batch[name] = np.array(batch[name])
    for (number, row, segment), label in zip(units, dealt, strict=True):
        batch = changed[number]
        for _, segments, name in streams(batch):
            batch[name][row][np.asarray(batch[segments])[row] == segment] = label
    return changed


def label_tokens(batches: Sequence[Batch], label_of: np.ndarray) -> list[Batch]:
    """Each token's label is `label_of` at its id."""
    changed = [dict(batch) for batch in batches]
    for batch in changed:
        for tokens, _, name in streams(batch):
            batch[name] = label_of[np.asarray(batch[tokens])].astype(np.int32)
    return changed


def shuffle_tokens(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The labels of a batch's tokens dealt out anew among them, padding aside."""
    generator = np.random.default_rng(seed)
    changed = [dict(batch) for batch in batches]
    for batch in changed:
        for _, segments, name in streams(batch):
            is_token_BT = np.asarray(batch[segments]) > 0
            labels_BT = np.array(batch[name])
            labels_BT[is_token_BT] = generator.permutation(labels_BT[is_token_BT])
            batch[name] = labels_BT
    return changed


def stack_labels(labellings: Sequence[Sequence[Batch]]) -> list[tuple[Batch, Batch]]:
    """Of each batch what all labellings share, and its labels with a leading axis for the labellings."""
    stacked = []
    for versions in zip(*labellings, strict=True):
        labels = {name: np.stack([v[name] for v in versions]) for *_, name in streams(versions[0])}
        stacked.append(({k: v for k, v in versions[0].items() if k not in labels}, labels))
    return stacked


def frequent_tokens(batches: Sequence[Batch], count: int) -> list[int]:
    """The ids of the commonest tokens, commonest first."""
    found: Counter[int] = Counter()
    for batch in batches:
        for tokens, segments, _ in streams(batch):
            found.update(np.asarray(batch[tokens])[np.asarray(batch[segments]) > 0].tolist())
    return [token for token, _ in found.most_common(count)]


def kind_of(text: str) -> str:
    """Which of KINDS a token's text is; of letters of several scripts the first counts."""
    bare = text.strip(" \u2581\u0120\n\t\u00a0\u202f")
    if not bare:
        return "space" if text else "other"
    if bare.startswith("<") and bare.endswith(">") and len(bare) > 2:
        return "other"  # A special token, or a part of a character.
    categories = {unicodedata.category(character)[0] for character in bare}
    if categories <= {"N"}:
        return "number"
    if categories <= {"P", "S"}:
        return "punctuation"
    letters = [character for character in bare if unicodedata.category(character)[0] in "LM"]
    if not letters:
        return "other"
    is_latin = unicodedata.name(letters[0], "").startswith("LATIN")
    return "Latin letters" if is_latin else "other letters"


def kinds_of(texts: Sequence[str]) -> np.ndarray:
    """The place in KINDS of each token id, whose texts these are."""
    return np.array([KINDS.index(kind_of(text)) for text in texts], np.int32)


def kinds_in(vocabulary: Vocabulary) -> np.ndarray:
    """The place in KINDS of each token id of a vocabulary.

    A part of a character has no kind, whatever letters its piece is written with.
    """
    ids = range(vocabulary.vocab_size)
    is_part = ["\ufffd" in vocabulary.decode([i]) for i in ids]
    return kinds_of(["" if is_part[i] else vocabulary.id_to_text(i) for i in ids])
