"""Metrics of question answering and labelling, from the definitions of their upstream scorers.

Scores are percentages, 0 to 100. XTREME-UP's scorer (google-research/xtreme-up, evaluation/) is the
reference for SQuAD's F1 and exact match, sequence accuracy and span F1: an English article goes and
string.punctuation goes whatever the language, so that scores compare with published ones.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from tasks.scoring import Target, check_pairs, raw_text

NO_ANSWER = "No Answer"
SPAN_DELIMITER = "$$"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def normalize_answer(answer: str) -> str:
    """SQuAD's normal form (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no English article, single spaces."""
    bare = answer.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def token_f1(prediction: str, target: str) -> float:
    """F1 of the bags of words of two normalised answers, 0 to 1; 0 where both are empty, as upstream."""
    words, wanted = prediction.split(), target.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """SQuAD's `f1` and `em` against one target each: means over examples.

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    pairs = [
        (normalize_answer(p), normalize_answer(raw_text(t)))
        for p, t in zip(predictions, targets, strict=True)
    ]
    return {
        "f1": 100 * sum(token_f1(p, t) for p, t in pairs) / len(pairs),
        "em": 100 * sum(p == t for p, t in pairs) / len(pairs),
    }


def boolean_accuracy(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Whether prediction and target agree that there is an answer at all (XTREME-UP's in-language QA).

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    pairs = zip(predictions, targets, strict=True)
    hits = sum((p == NO_ANSWER) == (raw_text(t) == NO_ANSWER) for p, t in pairs)
    return {"boolean_accuracy": 100 * hits / len(targets)}


def sequence_accuracy(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of predictions equal to their target, white space included (XTREME-UP's semantic parsing).

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    hits = sum(p == raw_text(t) for p, t in zip(predictions, targets, strict=True))
    return {"sequence_accuracy": 100 * hits / len(targets)}


def parse_spans(text: str) -> Counter[tuple[str, str]]:
    """The (label, entity) pairs of `LABEL: entity $$ LABEL: entity`, with their numbers.

    A part without exactly one colon is no span, as upstream: an entity that holds a colon is lost on both sides.
    """
    parts = (part.split(":") for part in text.split(f" {SPAN_DELIMITER} "))
    return Counter((part[0].strip(), part[1].strip()) for part in parts if len(part) == 2)


def span_f1(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """XTREME-UP's `span_f1`: micro-averaged over all spans of all examples; 0 where no span is right.

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    right = predicted = wanted = 0
    for prediction, target in zip(predictions, targets, strict=True):
        ours, gold = parse_spans(prediction), parse_spans(raw_text(target))
        right += (ours & gold).total()
        predicted += ours.total()
        wanted += gold.total()
    return {"span_f1": 100 * 2 * right / (predicted + wanted) if right else 0.0}


def final_number(answer: str) -> str | None:
    """The number after the first `#### `, without its commas; None without one (GSM8K's own extraction)."""
    match = _NUMBER.search(answer)
    return match[1].replace(",", "") if match else None


def number_match(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of predictions whose number after `#### ` is the target's, digit for digit.

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    hits = 0
    for prediction, target in zip(predictions, targets, strict=True):
        number = final_number(prediction)
        hits += number is not None and number == final_number(raw_text(target))
    return {"number_match": 100 * hits / len(targets)}
