"""Tool calls, tools and other keys of a conversation are rendered by the chat template, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from roll_gspo.data.conversations import make_samples, read_conversations
from roll_gspo.data.prompts import make_prompts
from roll_gspo.data.rows import read_rows
from roll_gspo.data.templates import ChatFormat
from roll_gspo.errors import DataError
from roll_gspo.models.tiny import CHAT_TEMPLATE, byte_tokenizer

WITH_TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
AS_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
USER, RESULT = {"role": "user", "content": "How warm?"}, {"role": "tool", "content": "7 C", "tool_call_id": "c1"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ROW = {"messages": [USER, CALLS, RESULT], "tools": TOOLS, "ground_truth": "7"}
RENDERED = (
    '<tools>{"type": "function", "function": {"name": "weather"}}<|user|>How warm?'
    '<|assistant|><call>weather{"city": "Bern"}<|end|><|tool|>7 C<|assistant|>'
)


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_of(folder: Path, row: Any, template: str = WITH_TOOLS, **chat: Any) -> str:
    rows = read_rows([write(folder, row)], "data")
    (prompt,) = make_prompts(rows, tokenizer_with(template), 999, "data", ChatFormat(**chat))
    return prompt.text


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "tools": json.dumps(TOOLS), "messages": json.dumps(ROW["messages"])},
        {**ROW, "messages": [USER, {"role": "assistant", "tool_calls": [AS_TEXT]}, RESULT]},
        {**ROW, "messages": [{**USER, "tool_calls": None, "name": ""}, CALLS, {**RESULT, "tool_calls": []}]},
    ],
    ids=["objects", "JSON text", "arguments as text, no content", "empty keys"],
)
def test_tool_calls_and_tools_reach_the_prompt(tmp_path: Path, row: dict[str, Any]) -> None:
    assert prompt_of(tmp_path, row) == RENDERED


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        (ROW, CHAT_TEMPLATE, "rows.jsonl:1: the chat template does not render 'tool_calls' of message 2 (assistant)"),
        ({**ROW, "messages": [USER]}, CHAT_TEMPLATE, "does not render 'tools' of the row"),
        ({"messages": [{**USER, "weight": 0}], "answer": "1"}, WITH_TOOLS, "does not render 'weight' of message 1"),
        ({"messages": [{**USER, "name": "Ada"}], "answer": "1"}, WITH_TOOLS, "does not render 'name' of message 1"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, USER], "answer": "1"},
            NO_SYSTEM,
            "does not render the content of message 1 (system)",
        ),
    ],
)
def test_parts_that_the_template_drops_are_refused_by_name(
    tmp_path: Path, row: dict[str, Any], template: str, text: str
) -> None:
    with pytest.raises(DataError) as caught:
        prompt_of(tmp_path, row, template)
    assert text in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_plain_template_refuses_tools_and_a_dropped_system_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not render 'tool_calls'"):
        make_prompts(read_rows([write(tmp_path, ROW)], "data"), byte_tokenizer(), 99, "data", ChatFormat("plain"))
    with pytest.raises(DataError, match=r"the content of message 1 \(system\)"):
        prompt_of(tmp_path, {"prompt": "x", "answer": "1"}, NO_SYSTEM, system_prompt="Be brief.")


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ([{"type": "function"}], "message 1 has the tool_calls"),
        ("weather", "message 1 has the tool_calls 'weather'"),
        ([{"function": {"name": "f", "arguments": "city=Bern"}}], "the arguments of 'f' are no JSON object"),
    ],
)
def test_malformed_tool_calls_are_refused(tmp_path: Path, calls: Any, text: str) -> None:
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}, USER], "answer": "1"}
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{text}"):
        read_rows([write(tmp_path, row)], "data")


def test_tool_calls_of_a_conversation_are_imitated(tmp_path: Path) -> None:
    row = {**ROW, "messages": [*ROW["messages"], {"role": "assistant", "content": "7 degrees"}]}
    conversations = read_conversations([write(tmp_path, row)], "data")
    tokenizer = tokenizer_with(WITH_TOOLS)
    (sample,) = make_samples(conversations, tokenizer, 999, "data").samples
    imitated = [i for i, kept in zip(sample.response_ids, sample.mask, strict=True) if kept]
    assert tokenizer.decode(imitated) == '<call>weather{"city": "Bern"}<|end|>7 degrees<|end|>'
    assert tokenizer.decode(sample.prompt_ids).startswith("<tools>{")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template does not render 'tool_calls' of message 2"):
        make_samples(conversations, byte_tokenizer(), 999, "data")


def test_conversation_may_end_with_a_tool_call(tmp_path: Path) -> None:
    (read,) = read_conversations([write(tmp_path, {**ROW, "messages": [USER, CALLS]})], "data")
    (sample,) = make_samples([read], tokenizer := tokenizer_with(WITH_TOOLS), 999, "data").samples
    assert tokenizer.decode(sample.response_ids) == '<call>weather{"city": "Bern"}<|end|>'


def test_columns_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "response": "b", "system": "Be brief.", "id": 1, "tag": "t"}]
    rows.append({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}], "answer": "c"})
    first, second = read_conversations([write(tmp_path, *rows)], "data")
    assert first.messages == second.messages
    assert caplog.messages == [
        "data: columns that are not part of a conversation are not read: system (1 rows), answer (1 rows)"
    ]
