"""Function calls: the canonical text, parsing, and the leaderboard's matching rules."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.errors import DataError
from tasks.function_calls import CallAnswers, canonical_call, matches, parse_call, standardize


def schema(required=("a",), **types):
    properties = {}
    for name, kind in types.items():
        outer, _, inner = kind.partition("/")
        properties[name] = {"type": outer, "description": name}
        if inner:
            properties[name]["items"] = {"type": inner}
    return {
        "name": "geo.find",
        "description": "Finds.",
        "parameters": {"type": "dict", "properties": properties, "required": list(required)},
    }


def answers(allowed, required=("a",), **types):
    return CallAnswers.from_schema(schema(required, **types), allowed)


def test_canonical_call_takes_first_values_and_leaves_out_optional_ones():
    given_answers = answers(
        {"a": [3, 4], "b": ["", "x"], "c": ["y", ""], "d": [{"k": ["v", "w"], "o": ["", 1]}]},
        a="integer",
        b="string",
        c="string",
        d="dict",
    )
    assert canonical_call(given_answers) == "geo.find(a=3, c='y', d={'k': 'v'})"


def test_canonical_call_gives_a_required_argument_though_it_may_be_empty():
    assert canonical_call(answers({"a": ["", "x"]}, a="string")) == "geo.find(a='x')"


def test_canonical_call_of_lists_of_dicts():
    given_answers = answers({"a": [[{"k": ["v", "w"]}, {"k": ["x"]}]]}, a="array/dict")
    assert canonical_call(given_answers) == "geo.find(a=[{'k': 'v'}, {'k': 'x'}])"


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("f(a=1)", ("f", {"a": 1})),
        (" [m.n.f(a=-1.5, b=None)] ", ("m.n.f", {"a": -1.5, "b": None})),
        ("f(a=(1, 'x'), b={'k': [True]})", ("f", {"a": (1, "x"), "b": {"k": [True]}})),
        ("f(a=name)", ("f", {"a": "name"})),
        ("f()", ("f", {})),
        ("f(1)", None),
        ("f(a=1, **b)", None),
        ("f(a=1); g()", None),
        ("f(a=1+1)", None),
        ("f(a=1)(b=2)", None),
        ("[f(), g()]", None),
        ("f(a=1", None),
        ("", None),
        ("f(a=__import__('os').system(command='x'))", None),
        ("f(a=" + "[" * 500 + "]" * 500 + ")", None),
        ("f(a='" + "x" * 30_000 + "')", None),
        ("f(a='\x00')", None),
    ],
)
def test_parse_call(text, call):
    assert parse_call(text) == call


def test_no_text_is_evaluated(tmp_path):
    target = tmp_path / "made"
    text = f"f(a=open({str(target)!r}, 'w'))"
    parse_call(text)
    matches(text, answers({"a": ["x"]}, a="string"))
    assert not target.exists()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_call_or_none(text):
    call = parse_call(text)
    assert call is None or isinstance(call[0], str)


def test_standardize():
    assert standardize("New York, N.Y. (it's)") == 'newyorkny(it"s)'


# Each row: types, allowed values, required, calls that match, calls that do not.
RULES = {
    "name": (
        {"a": "integer"},
        {"a": [1]},
        ("a",),
        ["geo.find(a=1)", "[geo.find(a=1)]"],
        ["find(a=1)", "geo_find(a=1)", "Geo.find(a=1)"],
    ),
    "strings ignore case, spaces and punctuation": (
        {"a": "string"},
        {"a": ["New York, NY"]},
        ("a",),
        ["geo.find(a='new york ny')", "geo.find(a='NEW-YORK,NY')"],
        ["geo.find(a='New York')", "geo.find(a=1)", "geo.find(a=['New York, NY'])"],
    ),
    "numbers keep their type, an int may stand for a float": (
        {"a": "integer", "b": "float"},
        {"a": [5], "b": [2.0]},
        ("a", "b"),
        ["geo.find(a=5, b=2)", "geo.find(b=2.0, a=5)"],
        ["geo.find(a=5.0, b=2)", "geo.find(a='5', b=2)", "geo.find(a=5, b=2.1)"],
    ),
    "bool is no integer": (
        {"a": "integer", "b": "boolean"},
        {"a": [1], "b": [True]},
        ("a", "b"),
        ["geo.find(a=1, b=True)"],
        ["geo.find(a=True, b=True)", "geo.find(a=1, b=1)", "geo.find(a=1, b='True')"],
    ),
    "an optional argument may be left out only where the answers say so": (
        {"a": "integer", "b": "string", "c": "string"},
        {"a": [1], "b": ["x", ""], "c": ["y"]},
        ("a",),
        ["geo.find(a=1, b='x', c='y')", "geo.find(a=1, c='y')"],
        ["geo.find(a=1)", "geo.find(c='y')", "geo.find(a=1, b='z', c='y')"],
    ),
    "no other argument": (
        {"a": "integer", "b": "string"},
        {"a": [1]},
        ("a",),
        ["geo.find(a=1)"],
        ["geo.find(a=1, b='x')", "geo.find(a=1, z=1)"],
    ),
    "lists in order, strings in them standardised": (
        {"a": "array/string"},
        {"a": [["Fish", "Cat"]]},
        ("a",),
        ["geo.find(a=['fish', 'cat'])"],
        ["geo.find(a=['cat', 'fish'])", "geo.find(a=['fish'])", "geo.find(a='fish')"],
    ),
    "tuples and lists are alike where a tuple is asked for": (
        {"a": "tuple/integer"},
        {"a": [[1, 2]]},
        ("a",),
        ["geo.find(a=(1, 2))", "geo.find(a=[1, 2])"],
        ["geo.find(a=(2, 1))"],
    ),
    "a tuple is no array": (
        {"a": "array/integer"},
        {"a": [[1, 2]]},
        ("a",),
        ["geo.find(a=[1, 2])"],
        ["geo.find(a=(1, 2))"],
    ),
    "dicts key by key": (
        {"a": "dict"},
        {"a": [{"k": ["v", "w"], "n": [1], "o": ["x", ""]}]},
        ("a",),
        ["geo.find(a={'k': 'W', 'n': 1})", "geo.find(a={'n': 1, 'k': 'v', 'o': 'x'})"],
        ["geo.find(a={'k': 'v'})", "geo.find(a={'k': 'v', 'n': 1, 'z': 2})", "geo.find(a={})"],
    ),
    "lists of dicts": (
        {"a": "array/dict"},
        {"a": [[{"k": ["v"]}, {"k": ["w"]}]]},
        ("a",),
        ["geo.find(a=[{'k': 'v'}, {'k': 'w'}])"],
        ["geo.find(a=[{'k': 'v'}])", "geo.find(a=[{'k': 'w'}, {'k': 'v'}])", "geo.find(a=[1, 2])"],
    ),
    "a name where the answer is a variable": (
        {"a": "integer"},
        {"a": ["count"]},
        ("a",),
        ["geo.find(a=count)", "geo.find(a='count')"],
        ["geo.find(a=COUNT)"],
    ),
    "none where it is allowed": (
        {"a": "string"},
        {"a": [None, "x"]},
        ("a",),
        ["geo.find(a=None)"],
        ["geo.find(a=0)"],
    ),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_matching_rules(rule):
    types, allowed, required, right, wrong = RULES[rule]
    given_answers = CallAnswers.from_json(answers(allowed, required, **types).to_json())
    assert [call for call in right if not matches(call, given_answers)] == []
    assert [call for call in wrong if matches(call, given_answers)] == []


@pytest.mark.parametrize("text", ["f(", "", "no call", "geo.find(a=1) and more", "[]", "{}"])
def test_what_is_no_call_does_not_match(text):
    assert not matches(text, answers({"a": [1]}, a="integer"))


def test_bad_schemas_and_answers():
    bad = schema(a="string")
    del bad["parameters"]["required"]
    with pytest.raises(DataError, match="without the field 'required'"):
        CallAnswers.from_schema(bad, {})
    with pytest.raises(DataError, match="type 'number'"):
        answers({"a": [1]}, a="number")
    with pytest.raises(DataError, match=r"parameters \['z'\], which the schema does not have"):
        answers({"z": [1]}, a="string")
    for text in ("", "[]", json.dumps({"name": "f"})):
        with pytest.raises(DataError, match="answers are not those of a function call"):
            CallAnswers.from_json(text)
