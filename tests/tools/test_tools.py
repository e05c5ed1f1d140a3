"""Schemas, checks of arguments, and the execution of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roll_gspo.errors import ConfigError, MissingDependencyError
from roll_gspo.tools.calls import FORMATS, Call, MalformedCall
from roll_gspo.tools.running import ToolBox
from roll_gspo.tools.spec import build_tools

SCHEMA = {
    "name": "look_up",
    "description": "Look something up.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "minLength": 2}, "tags": {"type": "array"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(__file__.rpartition("/")[0])
        yield


def box(*entries: Any, max_calls: int = 8, max_chars: int = 200) -> ToolBox:
    return ToolBox(build_tools(entries), FORMATS["hermes"].example, max_calls, max_chars)


def result(entry: Any, name: str, **arguments: Any) -> tuple[str, str]:
    """Return kind and text of one call."""
    (only,) = box(entry).run([Call(name, arguments)])
    return only.kind, only.text


def test_schema_is_made_from_signature_and_docstring() -> None:
    tool = build_tools(["own_tools.weather"])["weather"]
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Look up the weather.\n\nIt is always warm.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "name of the city, e.g. Bern."},
                    "days": {"type": "integer", "default": 1, "description": "number of days."},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                },
                "required": ["city"],
            },
        },
    }
    assert tool.usage == "weather(city: string, days?: integer, unit?: string)"


def test_schema_of_a_class_is_that_of_its_call() -> None:
    (tool,) = build_tools([{"type": "own_tools.Waiter", "arguments": {"together": 1}}]).values()
    function = tool.schema["function"]
    assert function["name"] == "waiter"
    assert function["parameters"]["properties"]["seconds"]["description"] == "how long"
    assert tool.function() == "waited 0"


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"city": "Bern"}, "value", '{"city": "Bern", "days": 1, "degrees": 20, "unit": "C"}'),
        (
            {"city": "Bern", "days": "2", "unit": "F"},
            "value",
            '{"city": "Bern", "days": 2, "degrees": 20, "unit": "F"}',
        ),
        ({}, "invalid", "city: Missing required argument"),
        ({"city": 3}, "invalid", "city: Input should be a valid string"),
        ({"city": "Bern", "town": "x"}, "invalid", "town: Unexpected keyword argument"),
        ({"city": "Bern", "unit": "K"}, "invalid", "unit: Input should be 'C' or 'F'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], kind: str, text: str) -> None:
    found = result("own_tools.weather", "weather", **arguments)
    usage = "expected weather(city: string, days?: integer, unit?: string)"
    assert found == (kind, text if kind == "value" else f"error: wrong arguments ({text}); {usage}")


@pytest.mark.parametrize("wrapped", [False, True])
def test_schema_may_come_from_a_file(tmp_path: Path, wrapped: bool) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "function", "function": SCHEMA} if wrapped else SCHEMA))
    entry = {"type": "own_tools.keywords", "schema": str(path)}
    assert build_tools([entry])["look_up"].schema == {"type": "function", "function": SCHEMA}
    assert result(entry, "look_up", city="Bern", tags=[1]) == ("value", '{"city": "Bern", "tags": [1]}')
    kind, text = result(entry, "look_up", city="B", tags=1)
    assert (kind, text) == (
        "invalid",
        "error: wrong arguments (city: 'B' is too short; tags: 1 is not of type 'array'); "
        "expected look_up(city: string, tags?: array)",
    )
    assert build_tools([{**entry, "name": "other"}])["other"].name == "other"


def test_results_are_in_the_order_of_the_calls() -> None:
    tools = box({"type": "own_tools.Waiter", "arguments": {"together": 2}}, "calculator")
    calls = [
        Call("waiter", {"seconds": 0.2}),
        Call("calculator", {"expression": "1+1"}),
        MalformedCall("invalid JSON"),
        Call("waiter", {}),
        Call("nothing", {}),
    ]
    results = tools.run(calls)
    assert [one.kind for one in results] == ["value", "value", "invalid", "value", "invalid"]
    assert [one.text for one in results][:4] == [
        "waited 0.2",
        "2",
        'error: malformed call: invalid JSON; write <tool_call>{"name": "...", "arguments": {...}}</tool_call>',
        "waited 0",
    ]
    assert results[4].text == (
        'error: there is no tool "nothing"; the tools are waiter(seconds?: number), calculator(expression: string)'
    )


def test_slow_call_fails_alone() -> None:
    tools = box({"type": "own_tools.Waiter", "timeout_s": 0.3}, "calculator")
    results = tools.run([Call("waiter", {"seconds": 30}), Call("calculator", {"expression": "2"})])
    assert [(one.kind, one.text) for one in results] == [
        ("error", "error: waiter took longer than 0.3 s"),
        ("value", "2"),
    ]


def test_errors_of_a_call_are_shown_and_errors_of_a_tool_raise() -> None:
    assert result("own_tools.failing", "failing", kind="value") == ("error", "error: ValueError: no ? result")
    assert result("own_tools.failing", "failing", kind="key")[0] == "error"
    with pytest.raises(RuntimeError):
        result("own_tools.failing", "failing", kind="broken")


def test_number_of_calls_and_length_of_results_are_limited() -> None:
    tools = box("calculator", max_calls=1, max_chars=10)
    first, second = tools.run([Call("calculator", {"expression": "2^100"})] * 2)
    assert first.text == "1267650600\n... (21 more characters)"
    assert (second.kind, second.text) == ("error", "error: onl\n... (30 more characters)")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "tools is []; write a list"),
        ("calculator", "write a list"),
        (["calculater"], "unknown name 'calculater'; did you mean 'calculator'?"),
        (["calculator", "calculator"], r"tools\[1\]: there are two tools 'calculator'"),
        ([{"type": "calculator", "timout_s": 1}], r"tools\[0\].timout_s: Unexpected keyword argument"),
        ([{"type": "calculator", "timeout_s": 0}], r"tools\[0\].timeout_s: Input should be greater than 0"),
        (
            [{"type": "calculator", "arguments": {"x": 1}}],
            "tool calculator: is a function, and arguments",
        ),
        ([{"type": "own_tools.Waiter", "arguments": {"x": 1}}], "unexpected keyword argument 'x'"),
        ([{"type": "calculator", "name": "my tool"}], "the name 'my tool' has other characters"),
        ([{"type": "calculator", "schema": "none.json"}], "schema: none.json cannot be read"),
        (["own_tools.positional"], "tool positional: the argument numbers cannot be named"),
        (["own_tools.awaited"], "tool awaited: it is async"),
        (["own_tools.missing"], "has no 'missing'"),
    ],
)
def test_wrong_entries_are_refused(entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[];", r"\[\];")):
        build_tools(entries)


def test_missing_package_of_a_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match="no_such_package"):
        build_tools(["needs_package.tool"])
