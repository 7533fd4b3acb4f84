"""FinQA's programs: parsing, execution, and whether two programs compute the same.

Source: Chen et al. 2021, and the definitions of czyssrs/FinQA, code/evaluate.

A program is `subtract(5829, 5735), divide(#0, 100)`: steps of one operation and two arguments, each a number, a
constant `const_100`, or `#k`, the result of step k. `table_max(row name, none)` and its like read a row of the table.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence

from sira_jax.errors import DataError
from tasks.scoring import Target, check_pairs, field, raw_text

Table = Sequence[Sequence[str]]
Step = tuple[str, str, str]
Result = float | str

_ARITHMETIC = ("add", "subtract", "multiply", "divide", "exp", "greater")
_TABLE = ("table_max", "table_min", "table_sum", "table_average")
_OPERATIONS = "|".join(sorted((*_ARITHMETIC, *_TABLE), key=len, reverse=True))
# A step ends where the next begins or the program ends: a row's name may hold commas and brackets.
_STEP = re.compile(rf"({_OPERATIONS})\((.*?)\)(?:,\s+(?=(?:{_OPERATIONS})\()|\s*$)", re.DOTALL)
_DECIMALS = 5
# A Mersenne prime: equal programs agree modulo it, unequal ones of d steps do with probability at most about 2^(d - 127).
_PRIME = 2**127 - 1


class ProgramError(ValueError):
    """A program that cannot be read or run. Of a prediction, it is a wrong answer and no mistake of the user."""


def parse_program(text: str) -> list[Step]:
    """The steps of a program as (operation, first argument, second argument). Raises ProgramError."""
    steps, at, text = [], 0, text.strip()
    while at < len(text):
        match = _STEP.match(text, at)
        # ", " where there is one: a number may have commas of its own.
        body = match[2] if match else ""
        first, comma, second = body.rpartition(", " if ", " in body else ",")
        if not comma:
            raise ProgramError(f"no step at {text[at : at + 40]!r}")
        steps.append((match[1], first.strip(), second.strip()))
        at = match.end()
    if not steps:
        raise ProgramError("an empty program")
    return steps


def parse_number(text: str) -> float:
    """`5,829`, `12%` (0.12), `const_100`, `-const_100`, `const_m1` (-1). Raises ProgramError for anything else."""
    bare = text.replace(",", "")
    constant = bare.replace("const_", "")
    try:
        if constant != bare:
            return float("-1" if constant == "m1" else constant)
        if "%" in bare:
            return float(bare.replace("%", "")) / 100
        return float(bare)
    except ValueError:
        raise ProgramError(f"{text!r} is no number") from None


def _reference(text: str, step: int) -> int | None:
    """k of `#k`, None for other arguments. Raises ProgramError where step k is not an earlier one."""
    if not text.startswith("#"):
        return None
    # A tokenizer may put a space after the sign. Python refuses to read a number of thousands of digits.
    digits = text[1:].strip()
    if not digits.isdecimal() or len(digits) > 9 or int(digits) >= step:
        raise ProgramError(f"{text!r} in step {step} is no earlier step")
    return int(digits)


def _cell(text: str) -> float:
    # A cell such as "$ 12.5 ( 3 )" counts up to its bracket.
    return parse_number(text.replace("$", "").split("(")[0].strip())


def _row(table: Table, name: str) -> list[float]:
    rows = {row[0]: row[1:] for row in table if row}
    if not rows.get(name):
        raise ProgramError(f"the table has no row {name!r}")
    return [_cell(cell) for cell in rows[name]]


def _compute(operation: str, first: Result, second: Result) -> Result:
    if isinstance(first, str) or isinstance(second, str):
        raise ProgramError(f"{operation} of {first!r} and {second!r}")
    if operation == "greater":
        return "yes" if first > second else "no"
    try:
        result = {
            "add": lambda: first + second,
            "subtract": lambda: first - second,
            "multiply": lambda: first * second,
            "divide": lambda: first / second,
            "exp": lambda: first**second,
        }[operation]()
    except ArithmeticError as error:
        raise ProgramError(f"{operation}: {error}") from None
    if isinstance(result, complex):
        raise ProgramError(f"{first} to the power {second} is not real")
    return result


def execute(program: str, table: Table) -> Result:
    """The result of the last step: a number rounded to 5 decimals, or "yes" or "no".

    Args:
      program: its text.
      table: rows of cells, the first cell of a row its name; of rows with one name the last counts.

    Raises:
      ProgramError: it cannot be read or run.
    """
    results: list[Result] = []
    for index, (operation, *arguments) in enumerate(parse_program(program)):
        if operation in _TABLE:
            row = _row(table, arguments[0])
            results.append(
                {
                    "table_max": max(row),
                    "table_min": min(row),
                    "table_sum": sum(row),
                    "table_average": sum(row) / len(row),
                }[operation]
            )
            continue
        earlier = [_reference(argument, index) for argument in arguments]
        values = [
            parse_number(argument) if k is None else results[k]
            for argument, k in zip(arguments, earlier, strict=True)
        ]
        results.append(_compute(operation, *values))
    last = results[-1]
    return last if isinstance(last, str) else round(last, _DECIMALS)


def _field_element(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=32).digest()
    return int.from_bytes(digest, "big") % _PRIME


def _symbols(steps: Sequence[Step]) -> set[object]:
    named: set[object] = set()
    for step in steps:
        named |= {step} if step[0] in _TABLE else {a for a in step[1:] if not a.startswith("#")}
    return named


def _symbolic_value(steps: Sequence[Step]) -> int:
    """The last step's value with a pseudo-random field element in place of each symbol. Raises ProgramError."""
    values: list[int] = []
    for index, step in enumerate(steps):
        operation, *arguments = step
        if operation in _TABLE:
            values.append(_field_element(step))
            continue
        earlier = [_reference(argument, index) for argument in arguments]
        first, second = (
            _field_element(argument) if k is None else values[k]
            for argument, k in zip(arguments, earlier, strict=True)
        )
        if operation == "divide" and second == 0:
            raise ProgramError("division by an expression that is always 0")
        values.append(
            {
                "add": lambda a, b: a + b,
                "subtract": lambda a, b: a - b,
                "multiply": lambda a, b: a * b,
                "divide": lambda a, b: a * pow(b, -1, _PRIME),
                # Powers and comparisons follow no rule of arithmetic here: equal where their arguments are.
                "exp": lambda a, b: _field_element("exp", a, b),
                "greater": lambda a, b: _field_element("greater", a, b),
            }[operation](first, second)
            % _PRIME
        )
    return values[-1]


def equal_programs(prediction: str, target: str) -> bool:
    """Whether two programs are the same formula: `add(1, 2)` and `add(2, 1)` are, `add(1, 2)` and `add(2, 2)` are not.

    As upstream, every number is a symbol named by its text, and a prediction may use no symbol the target has not. Upstream
    asks a computer algebra system; here both formulas are evaluated at one pseudo-random point of a large prime field, where
    different rational functions agree only by a negligible chance. Powers are equal where base and exponent are, so that rules
    such as x^a x^b = x^(a+b) are not seen, nor that x > x never holds.
    """
    try:
        steps, wanted = parse_program(prediction), parse_program(target)
        return _symbols(steps) <= _symbols(wanted) and (
            _symbolic_value(steps) == _symbolic_value(wanted)
        )
    except ProgramError:
        return False


def _is_right(prediction: str, target: Target) -> bool:
    table = json.loads(field(target, "table", "execution_accuracy"))
    wanted = json.loads(field(target, "exe_ans", "execution_accuracy"))
    try:
        return execute(prediction, table) == wanted
    except ProgramError:
        return False


def execution_accuracy(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of programs that compute the right answer; their targets have `table` and `exe_ans`, as JSON.

    Raises DataError for none, unequal numbers, or targets without these fields.
    """
    check_pairs(predictions, targets)
    hits = sum(_is_right(p, t) for p, t in zip(predictions, targets, strict=True))
    return {"execution_accuracy": 100 * hits / len(targets)}


def program_accuracy(predictions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """Percentage of programs that are the target's formula (see `equal_programs`).

    Raises DataError for none, or unequal numbers.
    """
    check_pairs(predictions, targets)
    hits = sum(equal_programs(p, raw_text(t)) for p, t in zip(predictions, targets, strict=True))
    return {"program_accuracy": 100 * hits / len(targets)}


def check_example(qa: Mapping) -> None:
    """Raises DataError where `qa.program` or `qa.exe_ans` is not what the metrics need."""
    answer = qa.get("exe_ans")
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    is_number = is_number and abs(answer) < math.inf
    if not (is_number or answer in ("yes", "no")):
        raise DataError(f"qa.exe_ans={answer!r}: a finite number, yes or no")
    try:
        parse_program(qa["program"])
    except ProgramError as error:
        raise DataError(f"qa.program={qa['program']!r}: {error}") from None
