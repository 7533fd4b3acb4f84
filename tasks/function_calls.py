"""Function calls as text: writing the canonical one, parsing, and matching with the answers.

The semantics are those of the Berkeley Function Calling Leaderboard: ShishirPatil/gorilla, folder
berkeley-function-call-leaderboard (Apache-2.0), `ast_checker` for one call in Python and
`ast_parse`. Own code. Text is parsed with `ast.parse` and never evaluated.

Differences from the leaderboard, all towards "wrong":
* An argument that is an arithmetic expression, a lambda or a call with keyword arguments is no
  value; upstream evaluates the first two.
* Arguments without a name, unpacking (`**x`) and repeated names make a call unparsable; upstream
  ignores the first.
* A prediction that makes upstream raise an exception is wrong.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sira_jax.errors import DataError

# JSON schema type names of the data -> the Python type that the parsed argument must have.
PYTHON_TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_NESTED_TYPES = ("array", "tuple")
# Longer predictions are wrong unread: the parser's recursion and memory grow with its input.
_MAX_CHARS = 20_000


@dataclass(frozen=True)
class CallAnswers:
    """What counts as right for one example.

    Attributes:
      name: the function to call.
      required: parameters that must be given.
      types: schema type of every parameter, and of its items for arrays and tuples (else None).
      allowed: for each parameter the allowed values; "" among them means that it may be left out.
    """

    name: str
    required: tuple[str, ...]
    types: Mapping[str, tuple[str, str | None]]
    allowed: Mapping[str, Sequence[Any]]

    @classmethod
    def from_schema(cls, function: Mapping, allowed: Mapping[str, Sequence[Any]]) -> "CallAnswers":
        """From a function's schema and its `ground_truth` arguments.

        Raises:
          DataError: a field is missing, a type is not one of PYTHON_TYPES, or an argument is not in
            the schema.
        """
        try:
            parameters = function["parameters"]
            types = {
                name: (
                    schema["type"],
                    schema["items"]["type"] if schema["type"] in _NESTED_TYPES else None,
                )
                for name, schema in parameters["properties"].items()
            }
            answers = cls(function["name"], tuple(parameters["required"]), types, dict(allowed))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"function schema without the field {error}") from None
        for name, (outer, inner) in types.items():
            if outer not in PYTHON_TYPES or (inner is not None and inner not in PYTHON_TYPES):
                raise DataError(f"parameter {name!r}: type {outer!r} of {inner!r} is unknown")
        unknown = sorted(set(allowed) - set(types))
        if unknown:
            raise DataError(f"answers for parameters {unknown}, which the schema does not have")
        return answers

    def to_json(self) -> str:
        """A JSON string that `from_json` reads."""
        return json.dumps(
            {
                "name": self.name,
                "required": self.required,
                "types": self.types,
                "allowed": self.allowed,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "CallAnswers":
        """Reads `to_json`'s string. Raises DataError where it is not one."""
        try:
            fields = json.loads(text)
            return cls(
                fields["name"],
                tuple(fields["required"]),
                {name: (outer, inner) for name, (outer, inner) in fields["types"].items()},
                fields["allowed"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"answers are not those of a function call: {error}") from None


def canonical_call(answers: CallAnswers) -> str:
    """The target text `name(arg=value, ...)`, in Python's notation.

    Each argument has its first allowed value. An argument whose first allowed value is "" is left
    out where the schema does not require it.
    """
    arguments = []
    for name, allowed in answers.allowed.items():
        if name in answers.required:
            value = next((value for value in allowed if value != ""), "")
        elif allowed and allowed[0] != "":
            value = allowed[0]
        else:
            continue
        arguments.append(f"{name}={_first_value(value, *answers.types[name])!r}")
    return f"{answers.name}({', '.join(arguments)})"


def _first_value(value: Any, outer: str, inner: str | None) -> Any:
    """Dictionaries list the allowed values of each key; this takes the first of each."""
    if outer == "dict" and isinstance(value, dict):
        return {key: options[0] for key, options in value.items() if options[0] != ""}
    if inner == "dict" and isinstance(value, list):
        return [_first_value(item, "dict", None) for item in value]
    return value


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the one call in `text`, None where it is no such call.

    `name(a=1)` and `[name(a=1)]` are calls. Values are constants, lists, tuples and dicts of them;
    a bare name stands for its own text, as a variable does in the leaderboard.
    """
    text = text.strip().strip("'")
    if len(text) > _MAX_CHARS:
        return None
    try:
        body = ast.parse(text, mode="eval").body
        if isinstance(body, ast.List | ast.Tuple):
            (body,) = body.elts
        if not isinstance(body, ast.Call) or body.args:
            return None
        arguments = {keyword.arg: _value(keyword.value) for keyword in body.keywords}
        if None in arguments or len(arguments) != len(body.keywords):
            return None
        return _function_name(body.func), arguments
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _function_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_function_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("not a function's name")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name):
            return name
        case ast.Subscript() | ast.Call(keywords=[]):
            return ast.unparse(node)
    raise ValueError("not a value")


def matches(text: str, answers: CallAnswers) -> bool:
    """Whether `text` is a call that the answers allow."""
    call = parse_call(text)
    if call is None:
        return False
    name, arguments = call
    if name != answers.name or not set(answers.required) <= set(arguments):
        return False
    if any(arg not in answers.types or arg not in answers.allowed for arg in arguments):
        return False
    left_out = set(answers.allowed) - set(arguments)
    if any("" not in answers.allowed[arg] for arg in left_out):
        return False
    return all(
        _argument_matches(value, *answers.types[arg], answers.allowed[arg])
        for arg, value in arguments.items()
    )


def standardize(text: str) -> str:
    """Drops spaces and `,./-_*^`, lowers the case, and makes single quotes double (as upstream)."""
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _standardized(value: Any) -> Any:
    return standardize(value) if isinstance(value, str) else value


def _argument_matches(value: Any, outer: str, inner: str | None, allowed: Sequence[Any]) -> bool:
    expected = PYTHON_TYPES[outer]
    if outer == "tuple" and isinstance(value, tuple):
        value = list(value)
    if outer == "float" and type(value) is int:
        value = float(value)
    # The type of the first allowed value: another one than the schema's means that the answer is
    # the name of a variable, which is compared as it stands.
    answer_type = next((type(option) for option in allowed if option != ""), None)
    is_variable = answer_type is not None and answer_type is not expected
    if type(value) is expected:
        if inner is not None and not _items_fit(value, PYTHON_TYPES[inner], allowed):
            return False
    elif type(value) is answer_type:
        is_variable = True
    else:
        return False
    if is_variable:
        return value in allowed
    if expected is dict:
        return _dict_matches(value, allowed)
    if inner == "dict":
        return _dicts_match(value, allowed)
    if expected is str:
        return standardize(value) in [standardize(o) for o in allowed if isinstance(o, str)]
    if expected is list:
        return [_standardized(item) for item in value] in [
            [_standardized(item) for item in option] for option in allowed
        ]
    return value in allowed


def _items_fit(value: list, item_type: type, allowed: Sequence[Any]) -> bool:
    """Whether the items have the schema's type or that of an allowed list (as upstream)."""

    def fits(item: Any, option: list) -> bool:
        own = next((type(other) for other in option if other != ""), None)
        return type(item) in (item_type, own)

    return any(
        not isinstance(option, list) or all(fits(item, option) for item in value)
        for option in allowed
    )


def _dict_matches(value: Mapping, allowed: Sequence[Any]) -> bool:
    """Each option maps a key to its allowed values; "" among them lets the key be left out."""

    def one(option: Mapping) -> bool:
        given = all(
            key in option and _standardized(item) in [_standardized(o) for o in option[key]]
            for key, item in value.items()
        )
        return given and all("" in option[key] for key in option if key not in value)

    return any(one(option) for option in allowed if isinstance(option, Mapping))


def _dicts_match(value: list, allowed: Sequence[Any]) -> bool:
    return any(
        len(value) == len(option)
        and all(
            isinstance(item, Mapping) and _dict_matches(item, [other])
            for item, other in zip(value, option, strict=True)
        )
        for option in allowed
    )
