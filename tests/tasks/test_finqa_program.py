"""FinQA's programs: executed by hand, and compared as formulas."""

import json

import pytest

from sira_jax.errors import DataError
from tasks.finqa_program import ProgramError, equal_programs, execute, parse_program
from tasks.metrics import METRICS

TABLE = [
    ["", "2008", "2007"],
    ["net sales", "$ 1,200", "$ 1,000.5"],
    ["margin ( a, b )", "12.5%", "10% ( 10 % )"],
    ["empty", "n/a", "3"],
    ["twice", "1", "2"],
    ["twice", "5", "7"],
]


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("subtract(5829, 5735), divide(#0, 100)", 0.94),
        ("add(1, 2)", 3),
        ("multiply(2.5, const_100)", 250),
        ("multiply(2, const_m1)", -2),
        ("add(-const_3, 1)", -2),
        ("add(1, 1), add(# 0, #0)", 4),
        ("divide(1, 3)", 0.33333),
        ("divide(60, 243), multiply(#0, const_100)", 24.69136),
        ("add(12%, 0.5)", 0.62),
        ("add(5,735, 1,000)", 6735),
        ("exp(2, 10)", 1024),
        ("greater(2, 1)", "yes"),
        ("greater(1, 1)", "no"),
        ("add(1, 1), greater(#0, 2)", "no"),
        ("table_sum(net sales, none)", 2200.5),
        ("table_average(net sales, none)", 1100.25),
        ("table_max(net sales, none), table_min(net sales, none), subtract(#0, #1)", 199.5),
        ("table_max(margin ( a, b ), none)", 0.125),
        ("table_min(margin ( a, b ), none), multiply(#0, 2)", 0.2),
        ("table_sum(twice, none)", 12),
        ("  add( 1 , 2 ) ", 3),
    ],
)
def test_execution_by_hand(program, result):
    assert execute(program, TABLE) == result


@pytest.mark.parametrize(
    "program",
    [
        "",
        "5829",
        "add(1)",
        "add(1, 2",
        "add(1, 2) add(3, 4)",
        "power(1, 2)",
        "add(#0, 1)",
        "add(1, 2), add(#1, 1)",
        "add(#x, 1)",
        "add(one, 1)",
        "divide(1, 0)",
        "exp(0, -1)",
        "exp(-8, 0.5)",
        "exp(10, 1000)",
        "greater(1, 2), add(#0, 1)",
        "table_sum(nothing, none)",
        "table_sum(empty, none)",
        "add(const_x, 1)",
    ],
)
def test_programs_without_a_result(program):
    with pytest.raises(ProgramError):
        execute(program, TABLE)


def test_parsing():
    assert parse_program("table_max(a (b), c, none), divide(#0, 2)") == [
        ("table_max", "a (b), c", "none"),
        ("divide", "#0", "2"),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("add(1, 2)", "add(2, 1)"),
        ("multiply(3, 4), add(#0, 5)", "multiply(4, 3), add(5, #0)"),
        # (a - b) / b = a / b - b / b
        ("subtract(7, 5), divide(#0, 5)", "divide(7, 5), divide(5, 5), subtract(#0, #1)"),
        # Steps that the result does not need.
        ("add(1, 2)", "subtract(1, 2), add(1, 2)"),
        ("table_max(x, none), divide(#0, 2)", "table_max(x, none), divide(#0, 2)"),
        ("add(1, 2), greater(#0, 3)", "add(2, 1), greater(#0, 3)"),
        ("add(1, 2), exp(#0, 3)", "add(2, 1), exp(#0, 3)"),
        ("add(1, 2), divide(# 0, 3)", "add(1, 2), divide(#0, 3)"),
    ],
)
def test_equal_formulas(one, other):
    assert equal_programs(one, other)
    assert equal_programs(other, one)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("subtract(1, 2)", "subtract(2, 1)"),
        # Equal numbers written otherwise are other symbols, as upstream.
        ("divide(1, 100)", "divide(1, const_100)"),
        ("add(2, 2)", "multiply(2, 2)"),
        # A symbol that the target has not, even where it cancels.
        ("add(1, 3), subtract(#0, 3), add(#1, 2)", "add(1, 2)"),
        ("table_max(y, none)", "table_max(x, none)"),
        ("table_min(x, none)", "table_max(x, none)"),
        ("greater(2, 1)", "greater(1, 2)"),
        ("exp(2, 3)", "exp(3, 2)"),
        ("add(1, #0)", "add(1, 2)"),
        ("add(1", "add(1, 2)"),
        ("subtract(1, 1), divide(2, #0)", "subtract(1, 1), divide(2, #0)"),
        ("", "add(1, 2)"),
    ],
)
def test_unequal_formulas(prediction, target):
    assert not equal_programs(prediction, target)


def target(program, answer):
    return {"targets": program, "table": json.dumps(TABLE), "exe_ans": json.dumps(answer)}


def test_accuracies():
    targets = [target("subtract(3, 1)", 2.0)] * 4
    # Right formula; right result by another formula; wrong result; no program.
    predictions = ["subtract(3, 1)", "add(1, 1)", "subtract(1, 3)", "2"]
    assert METRICS["execution_accuracy"](predictions, targets) == {"execution_accuracy": 50.0}
    assert METRICS["program_accuracy"](predictions, targets) == {"program_accuracy": 25.0}
    yes = [target("greater(3, 1)", "yes")]
    assert METRICS["execution_accuracy"](["greater(2, 1)"], yes) == {"execution_accuracy": 100.0}


def test_targets_need_their_table():
    with pytest.raises(DataError, match="execution_accuracy needs targets with the field 'table'"):
        METRICS["execution_accuracy"](["add(1, 2)"], ["add(1, 2)"])
