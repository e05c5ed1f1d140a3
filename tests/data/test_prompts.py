"""Conversion of rows to prompts: chat templates, system prompts and the length filter."""

from __future__ import annotations

import logging
import re

import pytest

from roll_gspo.config.data import CHAT_TEMPLATES
from roll_gspo.data.prompts import encode_chat, end_of_turn_ids, make_prompts
from roll_gspo.data.rows import DataRow
from roll_gspo.data.templates import TEMPLATES, ChatFormat, chat_template
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
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_prompt_ends_with_the_generation_prompt(tokenizer):
    (prompt,) = make_prompts([row("1+1?", difficulty=3)], tokenizer, 100, "data")
    assert prompt.text == "<user>1+1?<assistant>"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, tokenize=False
    )
    assert list(prompt.token_ids) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert prompt.row == {"difficulty": 3, "id": "r1", "ground_truth": "2", "domain": "math", "tag": "sums"}


def test_token_ids_are_ints(tokenizer):
    ids = encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    assert ids and all(type(i) is int for i in ids)


def test_system_prompt_is_added_to_rows_without_one(tokenizer):
    with_system = DataRow("r2", ({"role": "system", "content": "row"}, {"role": "user", "content": "x"}), "2")
    first, second = make_prompts([row("x"), with_system], tokenizer, 100, "data", ChatFormat(system_prompt="config"))
    assert first.text == "<system>config<user>x<assistant>"
    assert second.text == "<system>row<user>x<assistant>"


def test_long_prompts_are_dropped_and_counted(tokenizer, caplog):
    rows = [row("x" * n) for n in (1, 50, 2, 60)]
    limit = len(encode_chat(tokenizer, [{"role": "user", "content": "xx"}]))
    with caplog.at_level(logging.WARNING):
        prompts = make_prompts(rows, tokenizer, limit, "data")
    assert [p.text for p in prompts] == ["<user>x<assistant>", "<user>xx<assistant>"]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("data: ") and "2 of 4" in message
    assert f"prompt_length {limit} (longest {limit + 58}" in message


def test_only_long_prompts_raise_with_key_and_lengths(tokenizer):
    with pytest.raises(DataError, match=r"^data: .*prompt_length 5 .*longest 67"):
        make_prompts([row("x" * 10), row("x" * 50)], tokenizer, 5, "data")


def test_tokenizer_without_template_raises(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"^data: .*data_args\.template"):
        make_prompts([row("x")], tokenizer, 5, "data")


def test_row_rejected_by_the_template_raises_with_its_id(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"data: row 'r1': .*system, user.*System role not supported"):
        make_prompts([row("x")], tokenizer, 5, "data", ChatFormat(system_prompt="config"))


def test_system_prompt_of_the_domain_overrides_the_default(tokenizer):
    chat = ChatFormat(system_prompt="default", domain_system_prompts={"code": "write"})
    first, second = make_prompts([row("x"), row("x")], tokenizer, 100, "data", chat, ["code", "math"])
    assert (first.text, second.text) == ("<system>write<user>x<assistant>", "<system>default<user>x<assistant>")


def test_dropped_prompts_are_counted_per_domain(tokenizer, caplog):
    rows = [row("x" * n) for n in (1, 50, 2, 60, 70)]
    with caplog.at_level(logging.WARNING):
        make_prompts(rows, tokenizer, 40, "data", None, ["a", "a", "b", "b", "b"])
    assert caplog.records[0].getMessage().endswith(": a 1 of 2, b 2 of 3")


def test_empty_rows_raise(tokenizer):
    with pytest.raises(DataError, match=r"^data: there are no rows"):
        make_prompts([], tokenizer, 5, "data")


CONVERSATION = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "x"},
)
CHATML = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nyes"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "text", "end"),
    [
        ("plain", "hi\n\nyes\n\nx", None),
        ("chatml", CHATML, "<|im_end|>"),
        ("qwen2_5", QWEN + CHATML, "<|im_end|>"),
        ("qwen3", CHATML + "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("llama3", LLAMA, "<|eot_id|>"),
    ],
)
def test_named_template_renders_the_format_of_its_models(tokenizer, name, text, end):
    tokenizer.chat_template = None
    rows = [DataRow("r", CONVERSATION, "2")]
    chat = ChatFormat(name)
    if name != "plain":
        with pytest.raises(DataError, match=rf"^data: .*{name} .*{re.escape(TEMPLATES[name].tokens[0])}"):
            make_prompts(rows, tokenizer, 999, "data", chat)
        tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name].tokens)})
    (prompt,) = make_prompts(rows, tokenizer, 999, "data", chat)
    assert prompt.text == text
    assert end_of_turn_ids(tokenizer, chat) == ({tokenizer.get_vocab()[end]} if end else set())


def test_template_by_tag_and_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    first, second = make_prompts(
        [row("x"), DataRow("r", row("y").messages, "2")],
        tokenizer,
        99,
        "data",
        ChatFormat(str(path), {"sums": "plain"}),
    )
    assert (first.text, second.text) == ("x", "[y]")
    path.write_text("a\n{% for m in %}")
    with pytest.raises(DataError, match=r"^template: .*mine\.jinja:2: "):
        chat_template(str(path))


@pytest.mark.parametrize(
    ("name", "match"), [("chatlm", "'chatlm'; did you mean 'chatml'"), ("gone.jinja", "gone.jinja .*no such file")]
)
def test_unknown_template_raises_with_the_nearest_name(name, match):
    with pytest.raises(DataError, match=f"^template: .*{match}"):
        chat_template(name)


def test_schema_lists_the_names_of_the_templates():
    assert set(CHAT_TEMPLATES) == set(TEMPLATES)
