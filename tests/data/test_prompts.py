"""Rows to prompts with a real tokenizer: template, system prompt, length filter."""

from __future__ import annotations

import logging

import pytest

from roll_gspo.config.data import CHAT_TEMPLATES
from roll_gspo.data.prompts import ChatFormat, encode_chat, end_of_turn_ids, make_prompts
from roll_gspo.data.rows import DataRow
from roll_gspo.data.templates import TEMPLATES, chat_template
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
    first, second = make_prompts([row("x"), own], tokenizer, 100, "data", ChatFormat(system_prompt="ours"))
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
        make_prompts([row("x")], tokenizer, 5, "data", ChatFormat(system_prompt="ours"))


def test_system_prompt_of_the_domain_comes_before_that_of_all(tokenizer):
    chat = ChatFormat(system_prompt="ours", domain_system_prompts={"code": "write"})
    first, second = make_prompts([row("x"), row("x")], tokenizer, 100, "data", chat, ["code", "math"])
    assert (first.text, second.text) == ("<system>write<user>x<assistant>", "<system>ours<user>x<assistant>")


def test_dropped_prompts_are_counted_by_domain(tokenizer, caplog):
    rows = [row("x" * n) for n in (1, 50, 2, 60, 70)]
    with caplog.at_level(logging.WARNING):
        make_prompts(rows, tokenizer, 40, "data", None, ["a", "a", "b", "b", "b"])
    assert caplog.records[0].getMessage().endswith("are left out: 1 of 2 of a, 2 of 3 of b")


def test_nothing_to_tokenize_is_an_error(tokenizer):
    with pytest.raises(DataError, match="data: there is no row left"):
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
def test_named_template_writes_what_its_models_know(tokenizer, name, text, end):
    tokenizer.chat_template = None
    rows = [DataRow("r", CONVERSATION, "2")]
    chat = ChatFormat(name)
    if name != "plain":
        with pytest.raises(DataError, match=rf"data: the chat template {name} writes .*no token of this tokenizer"):
            make_prompts(rows, tokenizer, 999, "data", chat)
        tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name].tokens)})
    (prompt,) = make_prompts(rows, tokenizer, 999, "data", chat)
    assert prompt.text == text
    assert end_of_turn_ids(tokenizer, chat) == ({tokenizer.get_vocab()[end]} if end else set())


def test_template_of_a_tag_or_of_a_file(tokenizer, tmp_path):
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
    with pytest.raises(DataError, match=r"mine\.jinja:2: not a jinja template"):
        chat_template(str(path))


@pytest.mark.parametrize(
    ("name", "told"), [("chatlm", "unknown 'chatlm'; did you mean 'chatml'"), ("gone.jinja", "no such file")]
)
def test_unknown_template_is_an_error_with_the_nearest(name, told):
    with pytest.raises(DataError, match=told):
        chat_template(name)


def test_configuration_knows_the_names_of_the_templates():
    assert set(CHAT_TEMPLATES) == set(TEMPLATES)
