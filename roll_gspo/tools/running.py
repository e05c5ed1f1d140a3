"""Execution of the calls of one turn, all at the same time, each with a time limit."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from roll_gspo.tools.calls import Call, MalformedCall
from roll_gspo.tools.tool import ArgumentsError, Tool, ToolError

# What the arguments of a call can cause. Other exceptions are errors of the tool.
_ERRORS_OF_CALLS = (ToolError, ValueError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class ToolResult:
    """The result of a call, which the model reads.

    Attributes:
        text: the returned value, or why there is none.
        kind: `value`; `error` if the tool raised or was too slow; `invalid` if the call is malformed, names no tool or
            does not fit its schema.
    """

    text: str
    kind: Literal["value", "error", "invalid"]


@dataclass(frozen=True)
class ToolBox:
    """The tools of an environment.

    Attributes:
        tools: tools by name.
        example: a call in the format of the model, for error messages.
        max_calls: largest number of calls per turn; later ones get an error.
        max_chars: characters of a result; the rest is left out.
    """

    tools: Mapping[str, Tool]
    example: str
    max_calls: int
    max_chars: int

    def run(self, calls: Sequence[Call | MalformedCall]) -> list[ToolResult]:
        """Return the result of each call, in order.

        Raises:
            Exception: a tool raised another exception than `ToolError`, `ValueError`, `LookupError` or
                `ArithmeticError`, so it is the tool that is broken.
        """
        return [self._shown(call.result()) for call in [self._started(*numbered) for numbered in enumerate(calls)]]

    def _started(self, number: int, call: Call | MalformedCall) -> _Running:
        if number >= self.max_calls:
            return _Running(ToolResult(f"error: only {self.max_calls} calls are allowed per turn", "error"))
        if isinstance(call, MalformedCall):
            return _Running(_invalid(f"malformed call: {call.problem}; write {self.example}"))
        tool = self.tools.get(call.name)
        if tool is None:
            usages = ", ".join(tool.usage for tool in self.tools.values())
            return _Running(_invalid(f"there is no tool {json.dumps(call.name)}; the tools are {usages}"))
        try:
            arguments = tool.check(call.arguments)
        except ArgumentsError as error:
            return _Running(_invalid(f"wrong arguments ({error}); expected {tool.usage}"))
        return _Running(None, tool, arguments)

    def _shown(self, result: ToolResult) -> ToolResult:
        text = result.text.encode("utf-8", "replace").decode()  # tokenizers refuse lone surrogates
        if len(text) > self.max_chars:
            text = f"{text[: self.max_chars]}\n... ({len(text) - self.max_chars} more characters)"
        return ToolResult(text, result.kind)


def _invalid(problem: str) -> ToolResult:
    return ToolResult(f"error: {problem}", "invalid")


@dataclass
class _Running:
    """A call in its thread, or the result of a call that cannot be run."""

    known: ToolResult | None
    tool: Tool | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = time.monotonic()
        if self.tool is not None:
            self._thread.start()

    def result(self) -> ToolResult:
        """Wait for the call. Its thread is left behind if it is too slow."""
        if self.known is not None:
            return self.known
        assert self.tool is not None
        self._thread.join(max(0.0, self._started + self.tool.timeout_s - time.monotonic()))
        if self._thread.is_alive():
            return ToolResult(f"error: {self.tool.name} took longer than {self.tool.timeout_s:g} s", "error")
        if isinstance(self._error, _ERRORS_OF_CALLS):
            kind = "" if isinstance(self._error, ToolError) else f"{type(self._error).__name__}: "
            return ToolResult(f"error: {kind}{self._error}", "error")
        if self._error is not None:
            raise self._error
        return ToolResult(_as_text(self._value), "value")

    def _run(self) -> None:
        assert self.tool is not None
        try:
            self._value = self.tool.function(**self.arguments)
        except BaseException as error:
            self._error = error


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
