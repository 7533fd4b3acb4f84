"""Metrics over predicted texts. All scores are percentages, 0 to 100.

A target is the target text, or an example with the fields `targets` and, for `ast_match`,
`answers`. Texts are compared after stripping white space at both ends and in no other way: Babel's
no-break spaces count, for example.
"""

from collections.abc import Callable, Mapping, Sequence

from sacrebleu.metrics import CHRF

from sira_jax.errors import DataError
from tasks.function_calls import CallAnswers, matches

Target = str | Mapping[str, str]
Metric = Callable[[Sequence[str], Sequence[Target]], dict[str, float]]


def _text(target: Target) -> str:
    if isinstance(target, str):
        return target.strip()
    if "targets" not in target:
        raise DataError(f"a target needs the field 'targets'; it has {sorted(target)}")
    return target["targets"].strip()


def _check(predictions: Sequence[str], targets: Sequence[Target]) -> None:
    if len(predictions) != len(targets):
        raise DataError(f"{len(predictions)} predictions for {len(targets)} targets")
    if not targets:
        raise DataError("no predictions: a metric needs at least one example")


def exact_match(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of predictions equal to their target.

    Raises DataError for none, or unequal numbers.
    """
    _check(predictions, targets)
    hits = sum(p.strip() == _text(t) for p, t in zip(predictions, targets, strict=True))
    return {"exact_match": 100 * hits / len(targets)}


def chrf(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Corpus chrF with one reference each (Popović 2015; sacrebleu's chrF2: 6-grams, beta 2).

    Raises DataError for none, or unequal numbers.
    """
    _check(predictions, targets)
    references = [_text(target) for target in targets]
    score = CHRF().corpus_score([p.strip() for p in predictions], [references])
    return {"chrf": score.score}


def ast_match(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of predictions that are a call the answers allow (see `tasks.function_calls`).

    Raises DataError where a target has no readable field `answers`, for none, or unequal numbers.
    """
    _check(predictions, targets)
    hits = 0
    for prediction, target in zip(predictions, targets, strict=True):
        if isinstance(target, str) or "answers" not in target:
            raise DataError("ast_match needs targets with the field 'answers'")
        hits += matches(prediction, CallAnswers.from_json(target["answers"]))
    return {"ast_match": 100 * hits / len(targets)}


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "chrf": chrf,
    "ast_match": ast_match,
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
