"""Metrics over predicted texts. All scores are percentages, 0 to 100.

A target is the target text, or an example with the field `targets` and what else its metric needs. `exact_match`,
`chrf` and `ast_match` compare texts after stripping white space at both ends and in no other way: Babel's no-break
spaces count, for example.
"""

from collections.abc import Mapping, Sequence

from sacrebleu.metrics import CHRF

from sira_jax.errors import DataError
from tasks.finqa_program import execution_accuracy, program_accuracy
from tasks.function_calls import CallAnswers, matches
from tasks.qa_metrics import boolean_accuracy, number_match, sequence_accuracy, span_f1, squad
from tasks.rouge import rouge
from tasks.scoring import Metric, Target, check_pairs, field, text


def exact_match(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of predictions equal to their target.

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    hits = sum(p.strip() == text(t) for p, t in zip(predictions, targets, strict=True))
    return {"exact_match": 100 * hits / len(targets)}


def chrf(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Corpus chrF with one reference each (Popović 2015; sacrebleu's chrF2: 6-grams, beta 2).

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    references = [text(target) for target in targets]
    score = CHRF().corpus_score([p.strip() for p in predictions], [references])
    return {"chrf": score.score}


def ast_match(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of predictions that are a call the answers allow (see `tasks.function_calls`).

    Raises DataError where a target has no readable field `answers`, for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    hits = 0
    for prediction, target in zip(predictions, targets, strict=True):
        answers = CallAnswers.from_json(field(target, "answers", "ast_match"))
        hits += matches(prediction, answers)
    return {"ast_match": 100 * hits / len(targets)}


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "chrf": chrf,
    "ast_match": ast_match,
    "sequence_accuracy": sequence_accuracy,
    "squad": squad,
    "boolean_accuracy": boolean_accuracy,
    "span_f1": span_f1,
    "number_match": number_match,
    "execution_accuracy": execution_accuracy,
    "program_accuracy": program_accuracy,
    "rouge": rouge,
}


def evaluate(
    names: Sequence[str], predictions: Sequence[str], targets: Sequence[Target]
) -> dict[str, float]:
    """The scores of several metrics in one dictionary. Raises DataError for an unknown name."""
    scores: dict[str, float] = {}
    for name in names:
        if name not in METRICS:
            raise DataError(f"metric {name!r}: use {', '.join(METRICS)}")
        scores |= METRICS[name](predictions, targets)
    return scores
