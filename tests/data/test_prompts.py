"""Rows to prompts with a real tokenizer: template, system prompt, length filter."""

from __future__ import annotations

import logging

import pytest

from roll_gspo.data.prompts import encode_chat, make_prompts
from roll_gspo.data.rows import DataRow
from roll_gspo.errors import DataError
from roll_gspo.models.tiny import byte_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def row(text: str, **columns) -> DataRow:
    return DataRow("r1", ({"role": "user", "content": text},), "2", "math", "sums", columns)


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = CHAT
    return made


def test_prompt_is_the_templated_conversation_up_to_the_answer(tokenizer):
    (prompt,) = make_prompts([row("1+1?", difficulty=3)], tokenizer, 100, "data")
    assert prompt.text == "<user>1+1?<assistant>"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, tokenize=False
    )
    assert list(prompt.token_ids) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert prompt.row == {"difficulty": 3, "id": "r1", "ground_truth": "2", "domain": "math", "tag": "sums"}


def test_token_ids_are_plain_integers(tokenizer):
    ids = encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    assert ids and all(type(i) is int for i in ids)


def test_system_prompt_comes_first_unless_the_row_has_its_own(tokenizer):
    own = DataRow("r2", ({"role": "system", "content": "own"}, {"role": "user", "content": "x"}), "2")
    first, second = make_prompts([row("x"), own], tokenizer, 100, "data", system_prompt="ours")
    assert first.text == "<system>ours<user>x<assistant>"
    assert second.text == "<system>own<user>x<assistant>"


def test_long_prompts_are_dropped_whole_and_counted(tokenizer, caplog):
    rows = [row("x" * n) for n in (1, 50, 2, 60)]
    limit = len(encode_chat(tokenizer, [{"role": "user", "content": "xx"}]))
    with caplog.at_level(logging.WARNING):
        prompts = make_prompts(rows, tokenizer, limit, "data")
    assert [p.text for p in prompts] == ["<user>x<assistant>", "<user>xx<assistant>"]
    (record,) = caplog.records
    assert f"2 of 4 prompts are longer than prompt_length {limit} (longest {limit + 58}" in record.getMessage()


def test_all_prompts_too_long_is_an_error_with_the_longest_and_the_key(tokenizer):
    with pytest.raises(DataError, match=r"data: .*prompt_length 5 .*longest 67 .*raise prompt_length"):
        make_prompts([row("x" * 10), row("x" * 50)], tokenizer, 5, "data")


def test_tokenizer_without_template_is_an_error(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="data: the tokenizer has no chat template"):
        make_prompts([row("x")], tokenizer, 5, "data")


def test_template_that_refuses_a_role_is_an_error_that_names_the_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"data: row 'r1': .*system, user.*System role not supported"):
        make_prompts([row("x")], tokenizer, 5, "data", system_prompt="ours")
