"""Metrics against numbers worked out by hand."""

import pytest

from sira_jax.errors import DataError
from tasks.function_calls import CallAnswers
from tasks.metrics import METRICS, evaluate

ANSWERS = CallAnswers("f", ("a",), {"a": ("integer", None)}, {"a": [1, 2]}).to_json()


def test_exact_match_strips_the_ends_and_nothing_else():
    predictions = ["siku 3", " siku 3\n", "Siku 3", "siku\u00a03"]
    assert METRICS["exact_match"](predictions, ["siku 3"] * 4) == {"exact_match": 50.0}


def test_chrf_by_hand():
    # "ab" against "abc". Precisions of 1- and 2-grams: 2/2, 1/1; recalls: 2/3, 1/2; "ab" has no
    # longer ones. P = 1, R = 7/12, F2 = 5PR / (4P + R) = (35/12) / (55/12) = 7/11.
    assert METRICS["chrf"](["ab"], ["abc"])["chrf"] == pytest.approx(100 * 7 / 11)


def test_chrf_adds_up_counts_over_the_corpus():
    # Two pairs, "ab"/"abc" and "c"/"c": 1-grams 3 of 3 and 3 of 4, 2-grams 1 of 1 and 1 of 2.
    precision, recall = 1.0, (3 / 4 + 1 / 2) / 2
    expected = 5 * precision * recall / (4 * precision + recall)
    assert METRICS["chrf"](["ab", "c"], ["abc", "c"])["chrf"] == pytest.approx(100 * expected)


@pytest.mark.parametrize(("prediction", "score"), [("వేలు", 100.0), ("", 0.0), ("xyz", 0.0)])
def test_chrf_ends_of_the_scale(prediction, score):
    assert METRICS["chrf"]([prediction], ["వేలు"])["chrf"] == pytest.approx(score)


def test_ast_match():
    target = {"targets": "f(a=1)", "answers": ANSWERS}
    predictions = ["f(a=2)", "[f(a=1)]", "f(a=3)", "f("]
    assert METRICS["ast_match"](predictions, [target] * 4) == {"ast_match": 50.0}


def test_evaluate_joins_metrics():
    target = {"targets": "f(a=1)", "answers": ANSWERS}
    scores = evaluate(["exact_match", "ast_match"], ["f(a=2)", "f(a=1)"], [target] * 2)
    assert scores == {"exact_match": 50.0, "ast_match": 100.0}


@pytest.mark.parametrize("name", list(METRICS))
def test_bad_input(name):
    target = {"targets": "f(a=1)", "answers": ANSWERS}
    with pytest.raises(DataError, match="2 predictions for 1 targets"):
        METRICS[name](["a", "b"], [target])
    with pytest.raises(DataError, match="no predictions"):
        METRICS[name]([], [])


def test_missing_fields():
    with pytest.raises(DataError, match="needs targets with the field 'answers'"):
        METRICS["ast_match"](["f(a=1)"], ["f(a=1)"])
    with pytest.raises(DataError, match="needs the field 'targets'"):
        METRICS["exact_match"](["x"], [{"answers": "x"}])
    with pytest.raises(DataError, match="metric 'rogue': use exact_match, chrf, ast_match"):
        evaluate(["rogue"], ["x"], ["x"])
