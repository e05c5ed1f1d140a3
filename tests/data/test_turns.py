"""Conversations that grow turn by turn: recorded tokens against those of the chat template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_gspo.data.messages import Message
from roll_gspo.data.prompts import encode_chat
from roll_gspo.data.templates import TEMPLATES, ChatTemplate
from roll_gspo.data.turns import TokenRecord, TurnRenderer
from roll_gspo.errors import DataError
from roll_gspo.models.tiny import END, byte_tokenizer

# Keeps the thinking of the answers after the last message of the user only, as Qwen3 does.
DROPS_THINKING = ChatTemplate(
    "drops_thinking",
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if loop.index0 < ns.last else m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "<|im_end|>",
)
# Brackets around the user's text and an end-of-sequence token after every answer, as Mistral does.
BRACKETS = ChatTemplate(
    "brackets",
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]", "</s>"),
    "</s>",
)
# Rejects a result after a call that is part of a text, as Mistral does.
ORDERED = ChatTemplate(
    "ordered",
    "{% set ns = namespace(i=0) %}{% for m in messages if m['role'] != 'tool' %}"
    "{% if (m['role'] == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS]' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]", "</s>"),
    "</s>",
)
KEEPING = [*(TEMPLATES[name] for name in ("chatml", "qwen2_5", "llama3")), BRACKETS]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<|[]"), min_size=1, max_size=12)
WORDS = TEXTS.map(str.strip).filter(bool)  # Llama 3 trims the text of a message


def tokenizer_with(template: ChatTemplate) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens), "bos_token": END})
    return tokenizer


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def played(template: ChatTemplate, questions: list[str], answers: list[str]) -> tuple[Any, TokenRecord, list[Message]]:
    """Return tokenizer, record and messages of an episode whose model samples `answers` and ends each turn."""
    tokenizer = tokenizer_with(template)
    renderer = TurnRenderer(tokenizer, template)
    end = tokenizer.convert_tokens_to_ids(template.end_of_turn)
    history = [user(questions[0])]
    record = TokenRecord(tuple(encode_chat(tokenizer, history, template)))
    for number, text in enumerate(answers):
        sampled = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        record.add_answer(sampled, [-0.5] * len(sampled), [(number, len(sampled))])
        history.append(assistant(text))
        if number + 1 < len(questions):
            new = [user(questions[number + 1])]
            record.add_given(renderer.following(history, new, sampled[-1]))
            history += new
    return tokenizer, record, history


@pytest.mark.parametrize("template", KEEPING, ids=lambda template: template.name)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_recorded_tokens_are_those_of_the_template(template: ChatTemplate, turns: list[tuple[str, str]]):
    questions, answers = (list(texts) for texts in zip(*turns, strict=True))
    tokenizer, record, history = played(template, questions, answers[:-1])
    assert list(record.next_prompt) == encode_chat(tokenizer, history, template)


@pytest.mark.parametrize("template", KEEPING, ids=lambda template: template.name)
def test_only_sampled_tokens_are_in_the_mask(template: ChatTemplate):
    tokenizer, record, _ = played(template, ["a", "b", "c"], ["dd", "eee"])
    sampled = [token for token, is_sampled in zip(record.token_ids, record.mask, strict=True) if is_sampled]
    assert tokenizer.decode(sampled) == f"dd{template.end_of_turn}eee{template.end_of_turn}"
    assert record.num_sampled == 7
    assert record.turn_ends[0] == 3
    assert [value for value in record.log_probs if value] == [-0.5] * 7
    # given tokens belong to the run of the answer before them
    assert [version for version, _ in record.version_runs] == [0, 1]
    assert sum(count for _, count in record.version_runs) == len(record.token_ids)


def test_answer_that_was_cut_off_is_ended_first():
    template = TEMPLATES["chatml"]
    tokenizer = tokenizer_with(template)
    cut = tokenizer("ab", add_special_tokens=False)["input_ids"]
    tokens = TurnRenderer(tokenizer, template).following([user("q"), assistant("ab")], [user("r")], cut[-1])
    assert tokenizer.decode(tokens) == "<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"


def test_recorded_thinking_stays_although_the_template_drops_it():
    thought = "<think>x</think>y"
    tokenizer, record, history = played(DROPS_THINKING, ["q", "r"], [thought])
    assert thought in tokenizer.decode(record.next_prompt)
    renderer = TurnRenderer(tokenizer, DROPS_THINKING)
    before = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert not renderer.keeps(history[:2], history[2:], before + thought)
    assert renderer.keeps(history[:2], [{"role": "tool", "content": "z"}], before + thought)
    assert renderer.keeps([user("q"), assistant("y")], history[2:], before + "y")


def test_results_of_calls_follow_texts_although_the_template_rejects_their_order():
    tokenizer = tokenizer_with(ORDERED)
    renderer = TurnRenderer(tokenizer, ORDERED)
    end = tokenizer.convert_tokens_to_ids("</s>")
    result = {"role": "tool", "content": "7"}
    history = [user("q"), assistant("call"), result, assistant("call again")]
    assert tokenizer.decode(renderer.following(history, [result], end)) == "[TOOL_RESULTS]7[/TOOL_RESULTS]"
    assert renderer.keeps(history, [result], "")


def test_template_without_answers_raises():
    template = ChatTemplate("questions", "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="row 3: the chat template renders no content of an assistant message before"):
        TurnRenderer(byte_tokenizer(), template, place="row 3").following([user("q"), assistant("a")], [user("r")], 0)


def test_rejected_role_raises_with_the_roles():
    renderer = TurnRenderer(tokenizer_with(TEMPLATES["llama3"]), TEMPLATES["llama3"])
    with pytest.raises(DataError, match="rejects the roles user, assistant, tool"):
        renderer.following([user("q"), assistant("a")], [{"role": "tool", "content": "1"}], 0)
