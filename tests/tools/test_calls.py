"""Parsers of calls: every format, malformed calls, and hostile texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roll_gspo.tools.calls import FORMATS, Call, MalformedCall

ADD, WEATHER = Call("add", {"a": 1, "b": [2.5, None]}), Call("weather", {"city": 'Zürich "}{', "day": 2})
# How the chat templates of these models write the calls of an assistant message.
TEMPLATES = {
    "hermes": (
        '{{ content }}{% for call in calls %}{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
        "{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    ),
    "llama3": (
        "{{ '{\"name\": \"' + calls[0].name + '\", \"parameters\": ' }}{{ calls[0].arguments | tojson }}{{ '}' }}"
    ),
    "mistral": (
        "{{ content }}[TOOL_CALLS] [{% for call in calls %}"
        "{{ {'name': call.name, 'arguments': call.arguments, 'id': call.id} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]"
    ),
    "mistral, name before the arguments": (
        "{{ content }}{% for call in calls %}[TOOL_CALLS]{{ call.name }}[CALL_ID]{{ call.id }}[ARGS]"
        "{{ call.arguments | tojson }}{% endfor %}"
    ),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,20}", fullmatch=True)
CALLS = st.builds(
    Call,
    NAMES,
    st.dictionaries(st.text(max_size=6), JSON, max_size=3),
    st.from_regex(r"[a-zA-Z0-9]{9}", fullmatch=True),
)


def rendered(template: str, content: str, calls: list[Call]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # transformers gives this filter to chat templates
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(content=content, calls=calls)


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.sampled_from(["", "Let me see: "]), st.lists(CALLS, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_rendered_calls_are_read_back(name: str, content: str, calls: list[Call]) -> None:
    shown = calls[:1] if name == "llama3" else calls  # Llama 3 calls one tool at a time
    text = rendered(TEMPLATES[name], content, shown)
    read = FORMATS[name.partition(",")[0]].parse(text)
    expected = shown if "mistral" in name else [Call(call.name, call.arguments) for call in shown]
    assert list(read) == expected


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", "The answer is {4}.", ()),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2.5, null]}}', (ADD,)),
        ("llama3", 'I use {x} and [{"a": 1}].', ()),
        ("llama3", '{"answer": 4}', ()),
        ("llama3", '<|python_tag|>{"name": "add", "arguments": {"a": 1, "b": [2.5, null]}}', (ADD,)),
        (
            "llama3",
            '{"name": "add", "parameters": {"a": 1, "b": [2.5, null]}}; {"name": "f", "parameters": {}}',
            (ADD, Call("f", {})),
        ),
        ("mistral", "no call", ()),
        ("mistral", '[TOOL_CALLS]{"name": "f"} and more', (Call("f", {}),)),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": "{\\"a\\": 1}"}]', (Call("f", {"a": 1}),)),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', (Call("f", {"a": 1}),)),
    ],
)
def test_forms_of_calls(form: str, text: str, expected: tuple[Call, ...]) -> None:
    assert FORMATS[form].parse(text) == expected


@pytest.mark.parametrize(
    ("form", "text", "problem"),
    [
        ("hermes", "<tool_call>add(1, 2)</tool_call>", 'invalid JSON: Expecting value at "add(1, 2)</tool_call"'),
        ("hermes", "<tool_call>", "invalid JSON: Expecting value at the end of the text"),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', 'the call of "f" has no arguments'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "the JSON object has no name"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "the name is 3"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', 'arguments is "x", not an object'),
        ("hermes", "<tool_call>[1]</tool_call>", "[1] is no JSON object"),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {}} x</tool_call>',
            "the JSON object is followed by other text",
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "invalid JSON: NaN is no number"),
        ("hermes", "<tool_call>" + '{"a":' * 100_000, "invalid JSON: it is nested too deeply"),
        ("llama3", '{"name": "f", "parameters": ', "invalid JSON: Expecting value at the end of the text"),
        ("llama3", '{"name": "f"}', 'the call of "f" has no parameters'),
        ("llama3", "<|python_tag|>import os", "no JSON object follows <|python_tag|>"),
        ("mistral", "[TOOL_CALLS]", "nothing follows [TOOL_CALLS]"),
        ("mistral", "[TOOL_CALLS][]", "the list of calls is empty"),
        ("mistral", "[TOOL_CALLS]f(1)", "invalid JSON: Expecting value at the end of the text"),
    ],
)
def test_malformed_calls_are_reported(form: str, text: str, problem: str) -> None:
    assert FORMATS[form].parse(text) == (MalformedCall(problem),)


def test_other_calls_of_a_turn_are_read() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    read = FORMATS["hermes"].parse(f"{call}<tool_call>oops</tool_call>{call}")
    assert [type(one) for one in read] == [Call, MalformedCall, Call]


@pytest.mark.parametrize("form", FORMATS)
@given(st.text(st.sampled_from('{}[]",:<>/ abx1') | st.characters(), max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_is_parsed(form: str, text: str) -> None:
    starts = {"hermes": "<tool_call>", "llama3": "{", "mistral": "[TOOL_CALLS]"}
    for call in FORMATS[form].parse(starts[form] + text):
        assert isinstance(call, Call | MalformedCall)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("part", ["{", "<tool_call>", "[TOOL_CALLS]", '{"a":1}', "[TOOL_CALLS]x ", "\\", '"', "["])
def test_long_texts_are_parsed(form: str, part: str) -> None:
    """A parser that takes quadratic time would reach the time limit of the test."""
    assert all(isinstance(call, MalformedCall) for call in FORMATS[form].parse(part * (400_000 // len(part))))


@pytest.mark.long  # imports vLLM
@pytest.mark.vllm
@pytest.mark.parametrize("form", FORMATS)
def test_calls_are_those_of_vllm(form: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    from roll_gspo.models.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"]})
    parser = ToolParserManager.get_tool_parser({"llama3": "llama3_json"}.get(form, form))(tokenizer)
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], tools=tools)
    calls = [ADD] if form == "llama3" else [ADD, WEATHER]
    texts = [
        *(rendered(TEMPLATES[form], content, calls) for content in ("", "See: ")),
        "no call",
        '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "arguments": {}}',
        '<|python_tag|>{"name": "add", "parameters": {"a": {"b": "}"}}}',
        '<tool_call>{"name": "add", "arguments": {"a": 1}}',
        '[TOOL_CALLS]{"name": "add"} and more',
        '[TOOL_CALLS][{"name": "add", "arguments": "{}"}]',
        "<tool_call>oops</tool_call>",
        "{oops}",
        "[TOOL_CALLS]oops",
    ]
    for text in texts:
        theirs = parser.extract_tool_calls(text, request)
        ours = [call for call in FORMATS[form].parse(text) if isinstance(call, Call)]
        functions = [(call.function.name, json.loads(call.function.arguments)) for call in theirs.tool_calls]
        # vLLM's parser of Llama 3 passes on arguments of any type
        functions = [(name, arguments) for name, arguments in functions if isinstance(arguments, dict)]
        assert [(call.name, call.arguments) for call in ours] == functions, text
