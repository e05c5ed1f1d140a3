"""Parsing of conversations: messages, tool calls and tools of a row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from roll_gspo.data.files import abbreviate, parse_json
from roll_gspo.registry import did_you_mean

ROLES = ("system", "user", "assistant", "tool")
PROMPT_COLUMNS = ("messages", "prompt", "question")
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
_LIST_OF_CALLS = 'a list of {"type": "function", "function": {"name": ..., "arguments": {...}}}'

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of columns; None for the default names. A dotted name is a path into objects: `reward_model.ground_truth`.

    Attributes:
        messages: column of the conversation.
        prompt: column of the prompt, which is a text or a conversation.
        ground_truth: column of the expected answer, which is used unchanged.
        tag: column of the tag.
    """

    messages: str | None = None
    prompt: str | None = None
    ground_truth: str | None = None
    tag: str = "tag"


class Problem(NamedTuple):
    """A problem of a row.

    Attributes:
        kind: kind of the problem, with the same text for all rows.
        detail: description with the values of the row.
        fix: how to fix it.
    """

    kind: str
    detail: str
    fix: str


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or None. A dotted name that is no column is a path into nested objects."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def take(rest: dict[str, Any], name: str) -> Any:
    """Remove a column and return its value, or None. A nested value is not removed from its column."""
    return rest.pop(name) if name in rest else lookup(rest, name)


def pop_messages(rest: dict[str, Any], columns: Columns, found: str) -> tuple[tuple[Message, ...], tuple[Problem, ...]]:
    """Remove and return the conversation from the columns of a row; a prompt becomes a user message.

    Messages keep all keys that are not empty. The arguments of tool calls are parsed if they are JSON text.

    Args:
        rest: columns of the row, which are modified.
        columns: names of the columns.
        found: names of all columns of the row, for error messages.

    Returns:
        (messages, problems), one of them empty.
    """
    expected = columns.prompt or columns.messages or "messages, prompt or question"
    value, is_text = _pop_conversation(rest, columns)
    if value is None or (is_text and not value.strip()):
        reason = f"found {found}" if value is None else "it is empty"
        detail = f"no prompt: expected column {expected}, {reason}"
        return (), (Problem("no prompt", detail, "add one, or set data_args.prompt to the name of the column"),)
    return parse_messages([{"role": "user", "content": value}] if is_text else value)


def _pop_conversation(rest: dict[str, Any], columns: Columns) -> tuple[Any, bool]:
    """Remove and return a conversation or a text, and whether it is the text of a user message."""
    conversation, texts = columns.messages or PROMPT_COLUMNS[0], PROMPT_COLUMNS[1:]
    if columns.prompt is not None:
        conversation, texts = None, (columns.prompt,)
    elif columns.messages is not None:
        texts = ()
    if conversation is not None and (value := take(rest, conversation)) is not None:
        return value, False
    for name in texts:
        if (value := take(rest, name)) is not None:
            return value, isinstance(value, str)
    return None, False


def parse_messages(value: Any) -> tuple[tuple[Message, ...], tuple[Problem, ...]]:
    """Validate a conversation: a list of messages, or the JSON text of one.

    Returns:
        (messages, problems), one of them empty.
    """
    if isinstance(value, str):  # data files of ROLL store the list as JSON
        value = parse_json(value)
        if isinstance(value, ValueError):
            detail = f"messages must be a list of {{role, content}}, got a string that is not JSON ({value})"
            return (), (Problem("messages: not valid JSON", detail, "write a list, or the JSON text of one"),)
    if not isinstance(value, list) or not value:
        detail = f"messages must be a list of {{role, content}}, got {abbreviate(value)}"
        return (), (Problem("messages: not a list of messages", detail, "write [{role, content}, ...]"),)
    problems = tuple(p for number, m in enumerate(value, start=1) for p in _message_problems(m, number))
    return () if problems else tuple(_normalized(m) for m in value), problems


def _message_problems(message: Any, number: int) -> Iterator[Problem]:
    expected = f"messages must be a list of {{role, content}}, but message {number}"
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not {"role", *(() if calls else ("content",))} <= set(message):
        fix = "rename from to role and value to content" if _is_share_gpt(message) else "write {role, content}"
        yield Problem("messages: no role or content", f"{expected} is {abbreviate(message)}; {fix}", fix)
        return
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        alias = _ROLE_ALIASES.get(str(role))
        hint = f"; did you mean '{alias}'?" if alias else did_you_mean(str(role), list(ROLES))
        detail = f"{expected} has the unknown role {abbreviate(role)} (known: {', '.join(ROLES)}){hint}"
        yield Problem(f"messages: unknown role {abbreviate(role)}", detail, f"use one of {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and calls):
        detail = f"{expected} has the content {abbreviate(content)}, not a string"
        yield Problem("messages: content is not a string", detail, "write the content as one string")
    if calls:
        yield from _call_problems(calls, f"message {number}")
    if (damaged := _lone_surrogate(message)) is not None:
        detail = f"message {number} has {damaged}, which is half of a character and no Unicode text"
        yield Problem("messages: lone surrogate", detail, "write the whole character, or remove it")


def _call_problems(calls: Any, where: str) -> Iterator[Problem]:
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            detail = f"{where} has the tool_calls {abbreviate(calls)}, not {_LIST_OF_CALLS}"
            yield Problem("messages: malformed tool_calls", detail, "write each call with the name of its function")
            return
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not isinstance(parse_json(arguments), dict):
            detail = f"{where}: the arguments of {abbreviate(function['name'])} are no JSON object"
            yield Problem("messages: malformed tool_calls", detail, "write an object, or the JSON text of one")


def _normalized(message: Mapping[str, Any]) -> Message:
    """Return the message without empty keys. Arguments are objects, because chat templates write them as JSON."""
    kept = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    kept.setdefault("content", "")  # an assistant message that only calls tools
    if "tool_calls" in kept:
        kept["tool_calls"] = [_normalized_call(call) for call in kept["tool_calls"]]
    return kept


def _normalized_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _normalized_call(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": parse_json(arguments)} if isinstance(arguments, str) else dict(call)


def read_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | Problem:
    """Return the column `tools`: the schemas of the functions that the model may call. Empty if there are none."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        parsed = parse_json(value)
        value = value if isinstance(parsed, ValueError) else parsed
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        detail = f"tools must be a list of function schemas, or the JSON text of one, got {abbreviate(value)}"
        return Problem("tools: not a list of functions", detail, "write a list, or rename the column")
    if (damaged := _lone_surrogate(value)) is not None:
        detail = f"tools has {damaged}, which is half of a character and no Unicode text"
        return Problem("tools: lone surrogate", detail, "write the whole character, or remove it")
    return tuple(value)


def ends_with_answer(messages: Sequence[Message]) -> Problem | None:
    """Return the problem of a prompt that ends with the assistant's message."""
    if messages[-1]["role"] != "assistant":
        return None
    roles = ", ".join(message["role"] for message in messages)
    detail = f"messages end with the assistant's answer (roles {roles}), but the model is to write it"
    fix = "remove it, or set data_args.drop_last_answer: true"
    return Problem("conversation ends with the assistant", detail, fix)


def without_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages up to the last one that is not from the assistant."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _lone_surrogate(value: Any) -> str | None:
    """Return the escape of the first lone surrogate in any text of a value, or None."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])[1:-1]
    return None


def _is_share_gpt(message: Any) -> bool:
    return isinstance(message, dict) and {"from", "value"} <= set(message)
