"""Chat rows: what they may look like, which tokens are imitated, and what is said of those that cannot be used."""

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
from roll_gspo.data.prompts import ChatFormat, encode_chat
from roll_gspo.data.rows import Columns, Reading
from roll_gspo.errors import DataError
from roll_gspo.models.tiny import CHAT_TEMPLATE, byte_tokenizer

# as many templates do: a line break after the end of a turn, which nobody generates
WITH_LINES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# thinking is left out of every turn but the last
FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (
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


def imitated(tokenizer: Any, sample: ChatSample) -> tuple[str, str]:
    """The whole sequence, and the same with a dot for every token that is not imitated."""
    ids, mask = [*sample.prompt_ids, *sample.rest_ids], [*[False] * len(sample.prompt_ids), *sample.mask]
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
def test_every_format_is_the_same_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, "", row)
    (found,) = read_conversations([str(path)], "data_args.file_name")
    assert found == Conversation(
        f"{path}:2", tuple(messages(("user", "1+1"), ("assistant", "2"))), str(row.get("tag", ""))
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ({"prompt": "a", "ground_truth": "b"}, "nothing to imitate: expected messages with an assistant's turn"),
        ({"messages": messages(("user", "a"))}, "nothing to imitate"),
        ({"messages": messages(("assistant", "a"))}, "message 1 is the assistant's"),
        ({"messages": messages(("user", "a"), ("assistant", ""))}, "message 2, the assistant's, is empty"),
        ({"prompt": "a", "response": 5}, "response must be a text, got 5"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages must be a list of {role, content}"),
        (
            {"messages": [*messages(("user", "a")), {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
            "message 2 has tool_calls, which would be lost",
        ),
        (
            {"messages": json.dumps([{"role": "user", "content": "a", "name": "x"}])},
            "message 1 has name, which would be lost",
        ),
    ],
)
def test_bad_row_is_named_by_file_and_line(
    tmp_path: Path, row: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b"}, row)
    with pytest.raises(DataError) as caught:
        read_conversations([str(path)], "data_args.file_name")
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(read_conversations([str(path)], "data_args.file_name", "skip")) == 1
    assert "1 malformed rows skipped" in caplog.text


def test_every_turn_of_the_assistant_is_imitated_to_its_end() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    found = make_samples([conversation(("system", "s"), *TURNS)], tokenizer, 99, "chat.jsonl")
    (sample,) = found.samples
    whole, kept = imitated(tokenizer, sample)
    assert whole == "<|system|>s<|user|>a?<|assistant|>b<|end|><|user|>cc?<|assistant|>dd<|end|>"
    assert kept == "......b<|end|>.....dd<|end|>"
    assert len(sample) == 16 and sample.row == 0
    assert found.end_token_ids == {tokenizer.eos_token_id} and found.num_dropped == 0


def test_white_space_after_the_end_of_a_turn_is_not_imitated() -> None:
    tokenizer = tokenizer_with(WITH_LINES)
    (sample,) = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl").samples
    assert imitated(tokenizer, sample)[1] == "......b<|end|>........dd<|end|>"


def test_separate_turns_are_a_sequence_each() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    samples = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl", separate_turns=True).samples
    assert [imitated(tokenizer, s)[1] for s in samples] == ["....b<|end|>", "...........dd<|end|>"]
    assert [s.row for s in samples] == [0, 0]


def test_template_that_forgets_needs_separate_turns() -> None:
    tokenizer = tokenizer_with(FORGETFUL)
    row = conversation(("user", "a?"), ("assistant", "hm|b"), ("user", "c?"), ("assistant", "so|d"))
    with pytest.raises(DataError, match=r"^chat.jsonl:3: .* up to messages\[1\] otherwise .*multi_turn: separate"):
        make_samples([row], tokenizer, 99, "chat.jsonl")
    samples = make_samples([row], tokenizer, 99, "chat.jsonl", separate_turns=True).samples
    assert [imitated(tokenizer, s)[0].rpartition("<|assistant|>")[2] for s in samples] == ["hm|b<|end|>", "so|d<|end|>"]
    assert "hm" not in imitated(tokenizer, samples[1])[0]


def test_marks_of_the_template_decide() -> None:
    tokenizer = tokenizer_with(MARKED)
    (sample,) = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl").samples
    assert imitated(tokenizer, sample)[1] == "....b<|end|>.....dd<|end|>"


def test_named_templates_are_imitated_to_their_end_and_tags_choose_among_them() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    rows = [conversation(*TURNS[:2]), Conversation("chat.jsonl:4", tuple(messages(*TURNS[:2])), "chat")]
    found = make_samples(rows, tokenizer, 99, "chat.jsonl", ChatFormat("qwen3", {"chat": "chatml"}))
    thinking, plain = (imitated(tokenizer, sample) for sample in found.samples)
    assert thinking[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>")
    assert plain[0] == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert [text.lstrip(".") for _, text in (thinking, plain)] == ["b<|im_end|>", "b<|im_end|>"]
    assert found.end_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_answers_without_thought_begin_where_generation_begins() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    chat = ChatFormat("qwen3")
    samples = make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl", chat, separate_turns=True).samples
    for sample, end in zip(samples, (1, 3), strict=True):
        prompt = encode_chat(tokenizer, messages(*TURNS[:end]), chat.templates()["qwen3"])
        assert list(sample.prompt_ids) == prompt


def test_template_that_the_tokenizer_does_not_know_is_refused() -> None:
    with pytest.raises(DataError, match=r"chatml writes <\|im_start\|>"):
        make_samples([conversation(*TURNS)], byte_tokenizer(), 99, "chat.jsonl", ChatFormat("chatml"))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"query": "1+1", "response": "2", "prompt": "no", "kind": "sum"}, Columns(prompt="query", tag="kind")),
        ({"chat": messages(("user", "1+1"), ("assistant", "2")), "messages": 5}, Columns(messages="chat")),
    ],
)
def test_columns_may_have_other_names(tmp_path: Path, row: dict[str, Any], columns: Columns) -> None:
    (found,) = read_conversations([str(write(tmp_path, row))], "x", reading=Reading(columns))
    assert found.messages == tuple(messages(("user", "1+1"), ("assistant", "2")))
    assert found.tag == ("sum" if "kind" in row else "")


def test_split_of_files_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "response": "b"})
    with pytest.raises(DataError, match=r"split is 'train', but .* are files"):
        read_conversations([str(path)], "x", reading=Reading(split="train"))


def test_template_without_an_end_is_seen() -> None:
    found = make_samples([conversation(*TURNS)], tokenizer_with(NO_END), 99, "chat.jsonl")
    assert found.end_token_ids == frozenset()


def test_system_prompt_is_put_where_there_is_none() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    rows = [conversation(*TURNS), conversation(("system", "s"), *TURNS)]
    samples = make_samples(rows, tokenizer, 99, "chat.jsonl", ChatFormat(system_prompt="be brief")).samples
    assert [imitated(tokenizer, s)[0].partition("<|user|>")[0] for s in samples] == [
        "<|system|>be brief",
        "<|system|>s",
    ]


def test_long_sequences_are_dropped_and_counted_and_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    rows = [conversation(("user", "a"), ("assistant", "b" * n)) for n in (1, 2, 30)]
    with caplog.at_level(logging.WARNING):
        found = make_samples(rows, tokenizer, 6, "chat.jsonl")
    assert [len(s) for s in found.samples] == [5, 6] and found.num_dropped == 1
    assert "1 of 3 sequences are longer than sequence_length 6 (longest 34 tokens)" in caplog.text
    with pytest.raises(DataError, match=r"every sequence is longer than sequence_length 4 \(shortest 5, longest 34"):
        make_samples(rows, tokenizer, 4, "chat.jsonl")


def test_template_that_refuses_or_is_missing_is_an_error() -> None:
    refusing = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
    with pytest.raises(
        DataError, match=r"^chat.jsonl:3: the chat template refuses system, user, assistant \(no system"
    ):
        make_samples([conversation(("system", "s"), *TURNS[:2])], tokenizer_with(refusing), 99, "chat.jsonl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        make_samples([conversation(*TURNS)], tokenizer, 99, "chat.jsonl")


def test_generated_demonstrations_are_right_and_held_out_ones_are_others() -> None:
    train, held_out = (generate_conversations(200, 0, split) for split in ("train", "validation"))
    for c in (*train, *held_out):
        question, answer = (m["content"] for m in c.messages)
        a, b = map(int, question.removesuffix("=").split("+"))
        assert answer.rpartition(":")[2] == str(a + b)
    sums = [{c.messages[0]["content"] for c in split} for split in (train, held_out)]
    assert len(sums[0]) == 200 and not sums[0] & sums[1]
