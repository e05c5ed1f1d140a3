"""Test cases of programs, in the shapes that data sets have them.

A row's `test_cases` is a list (or the JSON text of one), or a single case. Which shape it is follows from `case_type`,
else from the cases:

| `case_type` | a case | passes if |
|---|---|---|
| `input`, `stdin` | `{stdin or input, expected_stdout or output}` | the program prints that |
| `functional`, `call` | `{input, output}` and a function | the function returns that |
| `assert`, `pytest` | `{assert_code}` or the code itself | each test function, or the code, runs through |
| `check_based` | `{assert_code, entry_point, import_prefix}` | its `check(entry_point)` runs through |
| `text` | `{assert_code}` with `{response}` in it | the code runs through; no program is looked for |

Also `{inputs: [...], outputs: [...], fn_name}` (APPS, TACO), LiveCodeBench's `testtype` (`stdin` or `functional`) in
each case, and Codeforces' `{input, output}`. `input` of a function is the list of its arguments, or their JSON texts,
one a line. The function is `fn_name`, `entry_point`, `test_case_function` or `metadata.func_name` of the row.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_IO, _CALL, _CODE, _CHECK = ("input", "stdin"), ("functional", "call"), ("assert", "pytest"), "check_based"
_KINDS = (*_IO, *_CALL, *_CODE, _CHECK, "text")
_STAND_IN = "response_of_the_model"
_FUNCTION_COLUMNS = ("fn_name", "entry_point", "test_case_function")


@dataclass(frozen=True)
class ScriptCase:
    """The program, given this, prints that."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class CallCase:
    """The function returns one of the expected values."""

    function: str
    arguments: Sequence[Any]
    expected: Sequence[Any]


@dataclass(frozen=True)
class CodeCases:
    """Unit tests as code.

    Attributes:
        sources: of the tests.
        entry_point: function for `check`, "" for tests without.
        prefix: what the program is preceded by.
        about_text: they are about the response's text, which stands for `{response}`.
    """

    sources: tuple[str, ...]
    entry_point: str = ""
    prefix: str = ""
    about_text: bool = False


class BadCasesError(ValueError):
    """A row's test cases have no known shape; the message says what was expected."""


def parse_cases(row: Mapping[str, Any]) -> list[ScriptCase | CallCase | CodeCases]:
    """The test cases of a row, at least one.

    Args:
        row: its columns; `test_cases` is needed.

    Raises:
        BadCasesError: with the number of the case.
    """
    kind = str(row.get("case_type") or "").strip()
    if kind and kind not in _KINDS:
        raise BadCasesError(f"case_type is '{kind}'; known: {', '.join(_KINDS)}")
    values = _listed(row.get("test_cases"), kind)
    function = _function(row)
    if isinstance(values, Mapping):
        function = str(values.get("fn_name") or function)
        values = _zipped(values)
    if not values:
        raise BadCasesError("test_cases is empty; give at least one case")
    if kind in _CODE or kind in (_CHECK, "text") or (not kind and all(_is_code(value) for value in values)):
        return _code(values, kind, function)
    return [_io(value, f"test_cases[{i}]", kind, function) for i, value in enumerate(values)]


def _listed(value: Any, kind: str) -> Any:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            if kind not in _CODE:
                raise BadCasesError(
                    f"test_cases is neither a list nor the JSON text of one ({_shown(value)}); LiveCodeBench's packed "
                    "private cases must be unpacked first"
                ) from None
    if value is None or value == "":
        raise BadCasesError("the row has no test_cases; add the column")
    if isinstance(value, str) or (isinstance(value, Mapping) and "inputs" not in value):
        return [value]
    if not isinstance(value, Mapping | list | tuple):
        raise BadCasesError(f"test_cases: expected a list of cases, got {_shown(value)}")
    return value


def _function(row: Mapping[str, Any]) -> str:
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    named = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    found = [str(value).strip() for value in (*(row.get(c) for c in _FUNCTION_COLUMNS), named) if value]
    return next((name for name in found if name and name != "None"), "")


def _zipped(value: Mapping[str, Any]) -> list[Any]:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise BadCasesError("test_cases: expected as many inputs as outputs, each a list")
    return [{"input": i, "output": o, "wrapped": True} for i, o in zip(inputs, outputs, strict=True)]


def _is_code(value: Any) -> bool:
    return isinstance(value, Mapping) and "assert_code" in value


def _code(values: Sequence[Any], kind: str, function: str) -> list[ScriptCase | CallCase | CodeCases]:
    sources = []
    for index, value in enumerate(values):
        source = value.get("assert_code") if isinstance(value, Mapping) else value
        if not isinstance(source, str) or not source.strip():
            raise BadCasesError(f"test_cases[{index}]: expected the text of a test or assert_code, got {_shown(value)}")
        if kind == "text":
            _check_placeholder(source, f"test_cases[{index}]")
        sources.append(source)
    first = values[0] if isinstance(values[0], Mapping) else {}
    if kind != _CHECK and (kind or not first.get("entry_point")):
        return [CodeCases(tuple(sources), about_text=kind == "text")]
    entry_point = str(first.get("entry_point") or function)
    if not entry_point:
        raise BadCasesError("test_cases[0]: check_based needs the name of the function as entry_point")
    return [CodeCases(tuple(sources), entry_point, str(first.get("import_prefix") or ""))]


def _check_placeholder(source: str, where: str) -> None:
    """Within quotes, what the response says could end the text and go on as code of the test."""
    try:
        tree = ast.parse(source.replace("{response}", _STAND_IN))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the sandbox tells
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    if names.count(_STAND_IN) != source.count("{response}"):
        raise BadCasesError(f"{where}: {{response}} is within quotes; write it bare, a literal takes its place")


def _io(value: Any, where: str, kind: str, function: str) -> ScriptCase | CallCase:
    shape = "{stdin or input, expected_stdout or output}"
    if not isinstance(value, Mapping):
        raise BadCasesError(f"{where}: expected {shape}, got {_shown(value)}")
    given = next((value[name] for name in ("stdin", "input") if name in value), None)
    expected = next((value[n] for n in ("expected_stdout", "output", "expected_output") if n in value), None)
    if given is None or expected is None:
        raise BadCasesError(f"{where}: expected {shape}, found {', '.join(map(str, value)) or 'nothing'}")
    # LiveCodeBench says so in each case; ROLL's `input` with a function's name is a call; lists can only be arguments.
    calls = kind in _CALL or value.get("testtype") == "functional"
    calls = calls or (bool(function) and kind != "stdin" and value.get("testtype") != "stdin")
    if not calls:
        return ScriptCase(_text(given, where), _text(expected, where))
    if not function:
        raise BadCasesError(f"{where}: a call needs the function's name in fn_name, entry_point or metadata.func_name")
    wanted = [_from_json(expected)]
    if value.get("wrapped") and isinstance(wanted[0], list) and len(wanted[0]) == 1:
        wanted.append(wanted[0][0])  # APPS wraps some results in a list
    return CallCase(function, _arguments(given, where), wanted)


def _arguments(given: Any, where: str) -> list[Any]:
    if isinstance(given, list):
        return given
    try:
        return [json.loads(line) for line in str(given).splitlines() if line.strip()]
    except ValueError:
        raise BadCasesError(f"{where}: expected arguments as JSON, one a line, got {_shown(given)}") from None


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str | int | float):
        raise BadCasesError(f"{where}: expected the text of stdin and stdout, got {_shown(value)}")
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
