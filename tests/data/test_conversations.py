"""Conversations for supervised fine-tuning: formats of rows, loss masks, and malformed rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from roll_gspo.data.conversations import (
    ChatSample,
    Conversation,
    generate_conversations,
    make_samples,
    read_conversations,
)
from roll_gspo.data.messages import Columns
from roll_gspo.data.prompts import encode_chat
from roll_gspo.data.rows import ReadOptions
from roll_gspo.data.templates import ChatFormat
from roll_gspo.errors import DataError
from roll_gspo.models.tiny import CHAT_TEMPLATE, byte_tokenizer

# Many templates render a newline after the end of a turn, which is never generated.
WITH_NEWLINES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Removes the thinking from all turns except the last one.
STRIPS_THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WITH_GENERATION_TAGS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
NO_END = CHAT_TEMPLATE.replace("<|end|>", "")
TURNS = [("user", "a?"), ("assistant", "b"), ("user", "cc?"), ("assistant", "dd")]


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation("chat.jsonl:3", tuple(messages(*turns)))


def rendered(tokenizer: Any, sample: ChatSample) -> tuple[str, str]:
    """Return the whole sequence, and the sequence with a dot for every token that is not in the loss."""
    ids, mask = [*sample.prompt_ids, *sample.response_ids], [*[False] * len(sample.prompt_ids), *sample.mask]
    tokens = [tokenizer.decode([token]) for token in ids]
    return "".join(tokens), "".join(t if kept else "." for t, kept in zip(tokens, mask, strict=True))


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "chat.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages(("user", "1+1"), ("assistant", "2"))},
        {"messages": json.dumps(messages(("user", "1+1"), ("assistant", "2"))), "id": 7},
        {"messages": messages(("user", "1+1"), ("assistant", "2"), ("user", "thanks"))},
        {"messages": messages(("user", "1+1")), "response": "2"},
        {"prompt": "1+1", "response": "2"},
        {"prompt": "1+1", "completion": "2", "tag": "sum"},
        {"question": "1+1", "answer": "2"},
    ],
)
def test_every_format_is_read_as_the_same_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, "", row)
    (read,) = read_conversations([str(path)], "data_args.file_name")
    assert read == Conversation(
        f"{path}:2", tuple(messages(("user", "1+1"), ("assistant", "2"))), str(row.get("tag", ""))
    )


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{", "not valid JSON"),
        ({"prompt": "a", "ground_truth": "b"}, "no response: "),
        ({"messages": messages(("user", "a"))}, "no response: "),
        ({"messages": messages(("assistant", "a"))}, "message 1 "),
        ({"messages": messages(("user", "a"), ("assistant", ""))}, "message 2 "),
        ({"prompt": "a", "response": 5}, "response must be a string or a list of messages, got 5"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages must be a list of {role, content}"),
        (
            {"messages": [*messages(("user", "a")), {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
            "message 2 has the tool_calls [{}]",
        ),
        ({"prompt": "a", "response": [{"role": "assistant", "content": 1}]}, "has the content 1, not a string"),
        ({"prompt": "a\ud83d", "response": "b"}, r"message 1 has \ud83d"),
    ],
)
def test_malformed_row_raises_with_file_and_line(
    tmp_path: Path, row: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b"}, row)
    with pytest.raises(DataError) as caught:
        read_conversations([str(path)], "data_args.file_name")
    assert str(caught.value).startswith(f"{path}:2: ") and text in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(read_conversations([str(path)], "data_args.file_name", "skip")) == 1
    assert f"{path}: skipped 1 " in caplog.text


def test_every_assistant_turn_is_in_the_loss_with_its_end_token() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    tokenized = make_samples([conversation(("system", "s"), *TURNS)], tokenizer, 99, "chat.jsonl")
    (sample,) = tokenized.samples
    whole, kept = rendered(tokenizer, sample)
    assert whole == "<|system|>s<|user|>a?<|assistant|>b<|end|><|user|>cc?<|assistant|>dd<|end|>"
    assert kept == "......b<|end|>.....dd<|end|>"
    assert len(sample) == 16 and sample.row == 0
    assert tokenized.end_token_ids == {tokenizer.eos_token_id} and tokenized.num_dropped == 0


def test_whitespace_after_the_end_of_a_turn_is_not_in_the_loss() -> None:
    tokenizer = tokenizer_with(WITH_NEWLINES)
    (sample,) = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl").samples
    assert rendered(tokenizer, sample)[1] == "......b<|end|>........dd<|end|>"


def test_separate_turns_become_separate_sequences() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    samples = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl", separate_turns=True).samples
    assert [rendered(tokenizer, s)[1] for s in samples] == ["....b<|end|>", "...........dd<|end|>"]
    assert [s.row for s in samples] == [0, 0]


def test_template_that_strips_thinking_needs_separate_turns() -> None:
    tokenizer = tokenizer_with(STRIPS_THINKING)
    row = conversation(("user", "a?"), ("assistant", "hm|b"), ("user", "c?"), ("assistant", "so|d"))
    with pytest.raises(DataError, match=r"^chat.jsonl:3: .* messages\[1\] .*multi_turn: separate"):
        make_samples([row], tokenizer, 99, "chat.jsonl")
    samples = make_samples([row], tokenizer, 99, "chat.jsonl", separate_turns=True).samples
    assert [rendered(tokenizer, s)[0].rpartition("<|assistant|>")[2] for s in samples] == ["hm|b<|end|>", "so|d<|end|>"]
    assert "hm" not in rendered(tokenizer, samples[1])[0]


def test_generation_tags_of_the_template_mark_the_turns() -> None:
    tokenizer = tokenizer_with(WITH_GENERATION_TAGS)
    (sample,) = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl").samples
    assert rendered(tokenizer, sample)[1] == "....b<|end|>.....dd<|end|>"


def test_tags_select_named_templates_and_their_end_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    rows = [conversation(*TURNS[:2]), Conversation("chat.jsonl:4", tuple(messages(*TURNS[:2])), "chat")]
    tokenized = make_samples(rows, tokenizer, 99, "chat.jsonl", ChatFormat("qwen3", {"chat": "chatml"}))
    thinking, plain = (rendered(tokenizer, sample) for sample in tokenized.samples)
    assert thinking[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>")
    assert plain[0] == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert [text.lstrip(".") for _, text in (thinking, plain)] == ["b<|im_end|>", "b<|im_end|>"]
    assert tokenized.end_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_response_starts_after_the_generation_prompt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    chat = ChatFormat("qwen3")
    samples = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl", chat, separate_turns=True).samples
    for sample, end in zip(samples, (1, 3), strict=True):
        prompt = encode_chat(tokenizer, messages(*TURNS[:end]), chat.templates()["qwen3"])
        assert list(sample.prompt_ids) == prompt


def test_template_with_unknown_tokens_raises() -> None:
    with pytest.raises(DataError, match=r"^chat\.jsonl: .*chatml .*<\|im_start\|>"):
        make_samples([conversation(*TURNS)], byte_tokenizer(), 99, "chat.jsonl", ChatFormat("chatml"))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"query": "1+1", "response": "2", "prompt": "no", "kind": "sum"}, Columns(prompt="query", tag="kind")),
        ({"chat": messages(("user", "1+1"), ("assistant", "2")), "messages": 5}, Columns(messages="chat")),
    ],
)
def test_column_names_are_configurable(tmp_path: Path, row: dict[str, Any], columns: Columns) -> None:
    (read,) = read_conversations([str(write(tmp_path, row))], "x", options=ReadOptions(columns))
    assert read.messages == tuple(messages(("user", "1+1"), ("assistant", "2")))
    assert read.tag == ("sum" if "kind" in row else "")


def test_split_of_files_raises(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b"})
    with pytest.raises(DataError, match=r"^x: split is 'train'"):
        read_conversations([str(path)], "x", options=ReadOptions(split="train"))


def test_template_without_end_token_has_no_end_token_ids() -> None:
    tokenized = make_samples([conversation(*TURNS)], tokenizer_with(NO_END), 99, "chat.jsonl")
    assert tokenized.end_token_ids == frozenset()


def test_system_prompt_is_added_to_conversations_without_one() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    rows = [conversation(*TURNS), conversation(("system", "s"), *TURNS)]
    samples = make_samples(rows, tokenizer, 99, "chat.jsonl", ChatFormat(system_prompt="be brief")).samples
    assert [rendered(tokenizer, s)[0].partition("<|user|>")[0] for s in samples] == [
        "<|system|>be brief",
        "<|system|>s",
    ]


def test_long_sequences_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    rows = [conversation(("user", "a"), ("assistant", "b" * n)) for n in (1, 2, 30)]
    with caplog.at_level(logging.WARNING):
        tokenized = make_samples(rows, tokenizer, 6, "chat.jsonl")
    assert [len(s) for s in tokenized.samples] == [5, 6] and tokenized.num_dropped == 1
    assert "1 of 3" in caplog.text and "sequence_length 6 (longest 34 tokens)" in caplog.text
    with pytest.raises(DataError, match=r"sequence_length 4 \(shortest 5, longest 34"):
        make_samples(rows, tokenizer, 4, "chat.jsonl")


def test_rejecting_and_missing_templates_raise() -> None:
    rejecting = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"^chat.jsonl:3: .*system, user, assistant \(no system"):
        make_samples([conversation(("system", "s"), *TURNS[:2])], tokenizer_with(rejecting), 99, "chat.jsonl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"^chat\.jsonl: .*data_args\.template"):
        make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl")


def test_generated_conversations_are_correct_and_splits_are_disjoint() -> None:
    train, held_out = (generate_conversations(200, 0, split) for split in ("train", "validation"))
    for c in (*train, *held_out):
        question, answer = (m["content"] for m in c.messages)
        a, b = map(int, question.removesuffix("=").split("+"))
        assert answer.rpartition(":")[2] == str(a + b)
    sums = [{c.messages[0]["content"] for c in split} for split in (train, held_out)]
    assert len(sums[0]) == 200 and not sums[0] & sums[1]
