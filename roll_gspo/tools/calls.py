"""Formats in which models write calls of tools.

| format | models | a call |
|---|---|---|
| `hermes` | Qwen2.5, Qwen3, Hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
| `llama3` | Llama 3 | `{"name": ..., "parameters": {...}}` |
| `mistral` | Mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` or `[TOOL_CALLS]name[ARGS]{...}` |

The parsers accept what vLLM's parsers of these names accept, without its imports. They differ in two points. A call
that cannot be read is reported, while vLLM returns the whole text as an answer. NaN and infinity are no JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

_MAX_CHARS_OF_PROBLEM = 200
_HERMES_START, _HERMES_END = "<tool_call>", "</tool_call>"
_LLAMA_TAG = "<|python_tag|>"
_MISTRAL_START = "[TOOL_CALLS]"
_MISTRAL_NAME = re.compile(r"([^\s\[{]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: name of the tool.
        arguments: arguments by name; JSON values.
        id: id that the model gave to the call, or None.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class MalformedCall:
    """A call that cannot be read.

    Attributes:
        problem: what is wrong.
    """

    problem: str


@dataclass(frozen=True)
class CallFormat:
    """A format of calls.

    Attributes:
        parse: function that returns the calls of a text in order; empty if it has none.
        example: a call, for error messages to the model.
        marks: texts with which the calls of an answer may begin.
    """

    parse: Callable[[str], tuple[Call | MalformedCall, ...]]
    example: str
    marks: tuple[str, ...]

    def text_before_calls(self, text: str) -> str:
        """Return the part of a text before its calls."""
        starts = [start for mark in self.marks if (start := text.find(mark)) >= 0]
        return text[: min(starts, default=len(text))]


def parse_hermes(text: str) -> tuple[Call | MalformedCall, ...]:
    """Return the calls between `<tool_call>` and `</tool_call>`. The last one may be unclosed."""
    found: list[Call | MalformedCall] = []
    position = 0
    while (start := text.find(_HERMES_START, position)) >= 0:
        start += len(_HERMES_START)
        try:
            value, end = _decode(text, start)
        except ValueError as error:
            closing = text.find(_HERMES_END, start)
            found.append(MalformedCall(str(error)))
        else:
            closing = text.find(_HERMES_END, end)
            if text[end : closing if closing >= 0 else None].strip():
                found.append(MalformedCall("the JSON object is followed by other text"))
            else:
                found.append(_call(value))
        position = closing if closing >= 0 else len(text)
    return tuple(found)


def parse_llama3(text: str) -> tuple[Call | MalformedCall, ...]:
    """Return the JSON objects with a name in a text, perhaps after `<|python_tag|>` and between other text.

    A text with braces is an answer, unless it begins with one, has the tag, or has an object with a name.
    """
    found: list[Call | MalformedCall] = []
    is_call = _LLAMA_TAG in text
    position = 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = _decode(text, start)
        except ValueError as error:
            found.append(MalformedCall(str(error)))
            is_call = is_call or not text[:start].strip()
            break
        found.append(_call(value, ("arguments", "parameters")))
        is_call = is_call or "name" in value
    if is_call and not found:
        return (MalformedCall(f"no JSON object follows {_LLAMA_TAG}"),)
    return tuple(found) if is_call else ()


def parse_mistral(text: str) -> tuple[Call | MalformedCall, ...]:
    """Return the calls after `[TOOL_CALLS]`: a JSON list, or a name and arguments per marker. Later text is ignored."""
    _, *parts = text.split(_MISTRAL_START)
    bodies = [body for part in parts if (body := part.strip())]
    if parts and not bodies:
        return (MalformedCall(f"nothing follows {_MISTRAL_START}"),)
    return tuple(call for body in bodies for call in _mistral_calls(body))


def _mistral_calls(body: str) -> list[Call | MalformedCall]:
    try:
        if body[0] in "[{":
            value, _ = _decode(body, 0)
            entries = value if isinstance(value, list) else [value]
            return [_mistral_call(entry) for entry in entries] or [MalformedCall("the list of calls is empty")]
        named = _MISTRAL_NAME.match(body)
        if named is None:
            return [MalformedCall("there is no name of a tool")]
        arguments, _ = _decode(body, named.end())
        return [_mistral_call({"name": named[1], "arguments": arguments, "id": named[2]})]
    except ValueError as error:
        return [MalformedCall(str(error))]


def _mistral_call(entry: Any) -> Call | MalformedCall:
    """Return a call whose arguments may be omitted, or be the JSON text of an object."""
    if isinstance(entry, dict):
        arguments = entry.get("arguments")
        if arguments is None:
            entry = {**entry, "arguments": {}}
        elif isinstance(arguments, str):
            entry = {**entry, "arguments": _decode(arguments, 0)[0]}
    return _call(entry)


def _call(value: Any, keys: tuple[str, ...] = ("arguments",)) -> Call | MalformedCall:
    if not isinstance(value, dict):
        return MalformedCall(f"{_shortened(value)} is no JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return MalformedCall("the JSON object has no name" if name is None else f"the name is {_shortened(name)}")
    key = next((key for key in keys if key in value), None)
    if key is None:
        return MalformedCall(f"the call of {_shortened(name)} has no {keys[-1]}")
    if not isinstance(value[key], dict):
        return MalformedCall(f"{key} is {_shortened(value[key])}, not an object")
    given_id = value.get("id")
    return Call(name, value[key], given_id if isinstance(given_id, str) and given_id else None)


def _decode(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, perhaps after white space, and its end.

    Raises:
        ValueError: there is no JSON value; the message is for the model.
    """
    space = _SPACE.match(text, start)
    start = space.end() if space else start
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        near = _shortened(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end of the text"
        raise ValueError(f"invalid JSON: {error.msg} at {near}") from None
    except RecursionError:
        raise ValueError("invalid JSON: it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"invalid JSON: {name} is no number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARS_OF_PROBLEM else text[:_MAX_CHARS_OF_PROBLEM] + "..."


FORMATS: Mapping[str, CallFormat] = {
    "hermes": CallFormat(parse_hermes, '<tool_call>{"name": "...", "arguments": {...}}</tool_call>', (_HERMES_START,)),
    "llama3": CallFormat(parse_llama3, '{"name": "...", "parameters": {...}}', (_LLAMA_TAG, "{")),
    "mistral": CallFormat(parse_mistral, '[TOOL_CALLS][{"name": "...", "arguments": {...}}]', (_MISTRAL_START,)),
}
