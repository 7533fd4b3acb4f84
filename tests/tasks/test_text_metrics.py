"""The metrics of question answering, labelling and summaries, on numbers worked out by hand."""

import json

import pytest

from sira_jax.errors import DataError
from tasks.metrics import METRICS
from tasks.qa_metrics import final_number, normalize_answer, parse_spans
from tasks.rouge import WordTokenizer


def test_squad_by_hand():
    predictions = ["The  Nile river!", "lake Victoria in Uganda", "Nile"]
    targets = ["a nile River", "Lake Victoria", "Congo"]
    # The second: 2 words common, of 4 and of 2: P = 1/2, R = 1, F1 = 2/3.
    scores = METRICS["squad"](predictions, targets)
    assert scores == {
        "f1": pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
        "em": pytest.approx(100 / 3),
    }


def test_squad_counts_repeated_words_once_each():
    # "to to be" against "to be be": common {to: 1, be: 1} of 3 and 3.
    assert METRICS["squad"](["to to be"], ["to be be"])["f1"] == pytest.approx(100 * 2 / 3)


def test_squad_of_empty_texts_is_upstream_s():
    """Equal, and yet no word in common."""
    assert METRICS["squad"](["the"], ["a"]) == {"f1": 0.0, "em": 100.0}


def test_squad_normal_form():
    assert normalize_answer("An apple, the (Big)  tree-house") == "apple big treehouse"
    # Words that begin with an article stay; other scripts' punctuation stays, as upstream.
    assert normalize_answer("Theatre and another") == "theatre and another"
    assert normalize_answer("ঢাকা।") == "ঢাকা।"


def test_boolean_accuracy():
    predictions = ["No Answer", "No Answer", "x", "y"]
    targets = ["No Answer", "x", "No Answer", "z"]
    assert METRICS["boolean_accuracy"](predictions, targets) == {"boolean_accuracy": 50.0}


def test_sequence_accuracy_strips_nothing():
    predictions = ["[IN:A ]", "[IN:A ] ", "[IN:B ]"]
    scores = METRICS["sequence_accuracy"](predictions, ["[IN:A ]", "[IN:A ]", "[IN:A ]"])
    assert scores == {"sequence_accuracy": pytest.approx(100 / 3)}


def test_span_f1_by_hand():
    targets = ["PER: Ali Manzu $$ LOC: Tanzania", "", "ORG: VOA"]
    predictions = ["LOC: Tanzania $$ PER: Ali", "DATE: 1976", "ORG: VOA"]
    # 2 right of 4 predicted and 3 wanted: P = 1/2, R = 2/3, F1 = 4/7.
    assert METRICS["span_f1"](predictions, targets)["span_f1"] == pytest.approx(100 * 4 / 7)


def test_span_f1_of_multisets():
    # One of the two equal spans is found: 1 of 1 predicted, of 2 wanted.
    score = METRICS["span_f1"](["PER: Ali"], ["PER: Ali $$ PER: Ali"])["span_f1"]
    assert score == pytest.approx(100 * 2 / 3)
    assert METRICS["span_f1"]([""], [""]) == {"span_f1": 0.0}


def test_spans_that_hold_a_colon_are_lost_on_both_sides():
    assert parse_spans("DATE: 10:30 $$ LOC: Kano $$ Kano") == {("LOC", "Kano"): 1}
    assert METRICS["span_f1"](["DATE: 10:30 $$ LOC: Kano"], ["LOC: Kano"]) == {"span_f1": 100.0}


def test_number_match():
    assert final_number("a 3\n#### 1,250") == "1250"
    assert final_number("#### -2.5 and #### 7") == "-2.5"
    assert final_number("the answer is 7") is None
    targets = ["so 4\n#### 1,250", "#### 18", "#### 18", "#### 3"]
    predictions = ["#### 1250", "#### 18.0", "18", "2+1 = 3\n#### 3 apples"]
    assert METRICS["number_match"](predictions, targets) == {"number_match": 50.0}


def test_rouge_by_hand():
    # Words: the cat sat / the cat ran home. 1-grams: 2 common of 3 and 4; 2-grams: 1 of 2 and 3; the longest common subsequence
    # has 2 words. F = 2 common / (predicted + wanted).
    scores = METRICS["rouge"](["the cat ran home"], ["The cat sat."])
    assert scores == {
        "rouge1": pytest.approx(100 * 2 * 2 / 7),
        "rouge2": pytest.approx(100 * 2 * 1 / 5),
        "rougeL": pytest.approx(100 * 2 * 2 / 7),
    }
    # Order counts for ROUGE-L alone: "b a" and "a b" share a subsequence of 1 word.
    assert METRICS["rouge"](["b a"], ["a b"]) == {
        "rouge1": pytest.approx(100),
        "rouge2": 0,
        "rougeL": pytest.approx(50),
    }


def test_rouge_is_the_mean_over_references_and_examples():
    several = {"targets": "a b", "references": json.dumps(["a b", "c d"])}
    # (1 + 0) / 2 for the first, 2 / 3 for the second.
    scores = METRICS["rouge"](["a b", "a"], [several, "a b"])
    assert scores["rouge1"] == pytest.approx(100 * (0.5 + 2 / 3) / 2)


@pytest.mark.parametrize(
    "text", ["ঢাকা বাংলাদেশের রাজধানী", "Ọjọ́ Ẹtì", "ประเทศไทย", "হিন্‌দু 12", "አዲስ አበባ"]
)
def test_rouge_of_any_script(text):
    scores = METRICS["rouge"]([text], [text])
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(100)
    assert METRICS["rouge"](["x"], [text])["rouge1"] == 0


def test_words():
    words = WordTokenizer().tokenize("«Karibu», it's 2.5 বাংলাদেশ।")
    assert words == ["karibu", "it", "s", "2", "5", "বাংলাদেশ"]


def test_ascii_words_are_those_of_rouge_score():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "#Person1#: Don't pay $1,250.50 -- it's TOO much; e-mail (now)!"
    assert WordTokenizer().tokenize(text) == DefaultTokenizer().tokenize(text)


def test_bad_references():
    with pytest.raises(DataError, match="references='\\[1\\]' is not allowed"):
        METRICS["rouge"](["x"], [{"targets": "x", "references": "[1]"}])
