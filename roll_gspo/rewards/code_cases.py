"""Parsing of test cases for programs, in the formats of common datasets.

The column `test_cases` of a row is a list of cases, the JSON text of one, or a single case. `case_type` names the
format; if it is absent, the format follows from the cases:

| `case_type` | format of a case | passes if |
|---|---|---|
| `input`, `stdin` | `{stdin or input, expected_stdout or output}` | the program prints the expected output |
| `functional`, `call` | `{input, output}` and a function | the function returns the expected value |
| `assert`, `pytest` | `{assert_code}` or the code itself | each test function, or the code, runs without an error |
| `check_based` | `{assert_code, entry_point, import_prefix}` | `check(entry_point)` runs without an error |
| `text` | `{assert_code}` that contains `{response}` | the code runs without an error; no program is extracted |

Also supported are `{inputs: [...], outputs: [...], fn_name}` (APPS, TACO), LiveCodeBench's `testtype` (`stdin` or
`functional`) in each case, and Codeforces' `{input, output}`. The `input` of a function is the list of its arguments,
or one JSON text per line. The function is the column `fn_name`, `entry_point`, `test_case_function` or
`metadata.func_name`.
"""

from __future__ import annotations

import ast
import contextlib
import decimal
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STDIN_TYPES = ("input", "stdin")
_CALL_TYPES = ("functional", "call")
_UNIT_TEST_TYPES = ("assert", "pytest")
_CHECK_TYPE = "check_based"
_CASE_TYPES = (*_STDIN_TYPES, *_CALL_TYPES, *_UNIT_TEST_TYPES, _CHECK_TYPE, "text")
_PLACEHOLDER_NAME = "response_of_the_model"
_MAX_DIGITS = 4300
_FUNCTION_COLUMNS = ("fn_name", "entry_point", "test_case_function")


@dataclass(frozen=True)
class StdinCase:
    """Input and expected output of a program."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class CallCase:
    """A function call, which passes if it returns one of the expected values."""

    function: str
    arguments: Sequence[Any]
    expected: Sequence[Any]


@dataclass(frozen=True)
class UnitTests:
    """Unit tests as source code.

    Attributes:
        sources: source code of each test.
        entry_point: name of the function that is passed to `check`; empty for other tests.
        prefix: source code to put before the program.
        tests_text: True if the tests check the text of the response, which replaces `{response}`.
    """

    sources: tuple[str, ...]
    entry_point: str = ""
    prefix: str = ""
    tests_text: bool = False


class InvalidCasesError(ValueError):
    """The test cases of a row are in no known format; the message names the expected one."""


def parse_cases(row: Mapping[str, Any]) -> list[StdinCase | CallCase | UnitTests]:
    """Parse the test cases of a row.

    Args:
        row: columns of the row; `test_cases` is required.

    Returns:
        At least one case.

    Raises:
        InvalidCasesError: the cases are missing or malformed; the message contains the index of the case.
    """
    kind = str(row.get("case_type") or "").strip()
    if kind and kind not in _CASE_TYPES:
        raise InvalidCasesError(f"case_type '{kind}' is unknown; use one of {', '.join(_CASE_TYPES)}")
    values = _as_list(row.get("test_cases"), kind)
    function = _function_name(row)
    if isinstance(values, Mapping):
        function = str(values.get("fn_name") or function)
        values = _zip_inputs_outputs(values)
    if not values:
        raise InvalidCasesError("test_cases is empty; add at least one case")
    if (
        kind in _UNIT_TEST_TYPES
        or kind in (_CHECK_TYPE, "text")
        or (not kind and all(_is_code(value) for value in values))
    ):
        return _unit_tests(values, kind, function)
    return [_single_case(value, f"test_cases[{i}]", kind, function) for i, value in enumerate(values)]


def _as_list(value: Any, kind: str) -> Any:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            if kind not in _UNIT_TEST_TYPES:
                raise InvalidCasesError(
                    f"test_cases is neither a list nor the JSON text of one ({_abbreviate(value)}); unpack "
                    "LiveCodeBench's compressed private cases first"
                ) from None
    if value is None or value == "":
        raise InvalidCasesError("test_cases is missing; add the column")
    if isinstance(value, str) or (isinstance(value, Mapping) and value.get("inputs") is None):
        return [value]
    if not isinstance(value, Mapping | list | tuple):
        raise InvalidCasesError(f"test_cases: expected a list of cases, got {_abbreviate(value)}")
    return value


def _function_name(row: Mapping[str, Any]) -> str:
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    named = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    found = [str(value).strip() for value in (*(row.get(c) for c in _FUNCTION_COLUMNS), named) if value]
    return next((name for name in found if name and name != "None"), "")


def _zip_inputs_outputs(value: Mapping[str, Any]) -> list[Any]:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise InvalidCasesError("test_cases: expected inputs and outputs as lists of equal length")
    return [{"input": i, "output": o, "wrapped": True} for i, o in zip(inputs, outputs, strict=True)]


def _is_code(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("assert_code") is not None


def _unit_tests(values: Sequence[Any], kind: str, function: str) -> list[StdinCase | CallCase | UnitTests]:
    sources = []
    for index, value in enumerate(values):
        source = value.get("assert_code") if isinstance(value, Mapping) else value
        if not isinstance(source, str) or not source.strip():
            raise InvalidCasesError(
                f"test_cases[{index}]: expected the source of a test or assert_code, got {_abbreviate(value)}"
            )
        if kind == "text":
            _check_placeholder(source, f"test_cases[{index}]")
        sources.append(source)
    first = values[0] if isinstance(values[0], Mapping) else {}
    if kind != _CHECK_TYPE and (kind or not first.get("entry_point")):
        return [UnitTests(tuple(sources), tests_text=kind == "text")]
    entry_point = str(first.get("entry_point") or function)
    if not entry_point:
        raise InvalidCasesError("test_cases[0]: check_based needs the name of a function; set entry_point")
    return [UnitTests(tuple(sources), entry_point, str(first.get("import_prefix") or ""))]


def _check_placeholder(source: str, where: str) -> None:
    """Refuse a quoted `{response}`: the response could close the quotes and continue as code of the test."""
    try:
        tree = ast.parse(source.replace("{response}", _PLACEHOLDER_NAME))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the sandbox reports it
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    if names.count(_PLACEHOLDER_NAME) != source.count("{response}"):
        raise InvalidCasesError(
            f"{where}: {{response}} is within quotes; remove them, because it is replaced by a string literal"
        )


def _single_case(value: Any, where: str, kind: str, function: str) -> StdinCase | CallCase:
    shape = "{stdin or input, expected_stdout or output}"
    if not isinstance(value, Mapping):
        raise InvalidCasesError(f"{where}: expected {shape}, got {_abbreviate(value)}")
    present = {name: one for name, one in value.items() if one is not None}
    given = next((present[name] for name in ("stdin", "input") if name in present), None)
    expected = next((present[n] for n in ("expected_stdout", "output", "expected_output") if n in present), None)
    if given is None or expected is None:
        raise InvalidCasesError(f"{where}: expected {shape}, found {', '.join(map(str, present)) or 'nothing'}")
    # LiveCodeBench marks calls in each case. ROLL's `input` with a function name is a call, too.
    calls = kind in _CALL_TYPES or value.get("testtype") == "functional"
    calls = calls or (bool(function) and kind != "stdin" and value.get("testtype") != "stdin")
    if not calls:
        return StdinCase(_as_text(given, where), _as_text(expected, where))
    if not function:
        raise InvalidCasesError(
            f"{where}: a call needs the name of a function; set fn_name, entry_point or metadata.func_name"
        )
    return CallCase(function, _arguments(given, where), _alternatives(expected, bool(value.get("wrapped"))))


def _arguments(given: Any, where: str) -> list[Any]:
    if isinstance(given, list):
        return given
    try:
        return [json.loads(line, parse_int=_large_int) for line in str(given).splitlines() if line.strip()]
    except ValueError:
        raise InvalidCasesError(f"{where}: expected one JSON argument per line, got {_abbreviate(given)}") from None


def _large_int(digits: str) -> int:
    return int(decimal.Decimal(digits))  # `int` refuses more than 4300 digits


def _alternatives(expected: Any, wrapped: bool) -> list[Any]:
    """Return the values that a call may return: a text may be JSON, a Python literal, or the value itself.

    Args:
        expected: expected value in the row.
        wrapped: True if a list of one value may stand for the value, as in APPS.
    """
    found = [expected]
    if isinstance(expected, str):
        for parse in (parse_json, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                found.append(plain_value(parse(expected.strip())))
    if wrapped:
        found += [value[0] for value in found if isinstance(value, list) and len(value) == 1]
    return [value for i, value in enumerate(found) if all(repr(value) != repr(earlier) for earlier in found[:i])]


def parse_json(text: str) -> Any:
    """Parse JSON. Integers of more than 4300 digits, which `int` refuses, become text."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= _MAX_DIGITS else digits)


def plain_value(value: Any) -> Any:
    """Convert a Python value to what the sandbox returns for it: tuples become lists, and keys text."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key): plain_value(one) for key, one in value.items()}
    return [plain_value(one) for one in value] if isinstance(value, list | tuple) else value


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str | int | float):
        raise InvalidCasesError(f"{where}: expected stdin and stdout as text, got {_abbreviate(value)}")
    return str(value)


def _abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
