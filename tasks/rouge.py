"""ROUGE-1, ROUGE-2 and ROUGE-L through rouge-score, with a tokenizer for every script.

rouge-score's own tokenizer keeps [a-z0-9] and nothing else, so that equal Bengali texts score 0. Ours keeps letters,
marks and digits of all scripts, lower-cased. On text of ASCII alone the words, and so the scores without stemming,
are those of rouge-score.
"""

import json
import unicodedata
from collections.abc import Sequence

from sira_jax.errors import DataError
from tasks.scoring import Target, check_pairs, raw_text

KINDS = ("rouge1", "rouge2", "rougeL")
# Letters, marks (the vowel signs of Indic scripts are marks) and numbers.
_KEPT = frozenset("LMN")
# Joiners stand inside words of Bengali and Persian.
_JOINERS = "\u200c\u200d"


class WordTokenizer:
    """Splits into runs of letters, marks and digits, lower-cased; for rouge-score's `tokenizer`."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`."""
        kept = (
            c if unicodedata.category(c)[0] in _KEPT or c in _JOINERS else " " for c in text.lower()
        )
        return "".join(kept).split()


def _references(target: Target) -> list[str]:
    if isinstance(target, str) or "references" not in target:
        return [raw_text(target)]
    references = json.loads(target["references"])
    if not references or not all(isinstance(text, str) for text in references):
        raise DataError(f"references={target['references']!r} is not allowed: a JSON list of texts")
    return references


def rouge(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL`: F-measures from 0 to 100, the mean over examples (Lin 2004).

    An example with several `references` (a JSON list) counts the mean over them. No stemming, since its rules are English.

    Raises:
      DataError: no examples, unequal numbers, or `references` that are no list of texts.
    """
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK, which takes long to import

    check_pairs(predictions, targets)
    scorer = RougeScorer(list(KINDS), tokenizer=WordTokenizer())
    sums = dict.fromkeys(KINDS, 0.0)
    for prediction, target in zip(predictions, targets, strict=True):
        references = _references(target)
        for reference in references:
            scores = scorer.score(reference, prediction)
            for kind in KINDS:
                sums[kind] += scores[kind].fmeasure / len(references)
    return {kind: 100 * total / len(targets) for kind, total in sums.items()}
