"""Text after the thinking, for every reward that reads an answer, and the text that rewards receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from roll_gspo.data.rendering import response_text
from roll_gspo.models import tiny
from roll_gspo.rewards.code_sandbox import CodeSandbox
from roll_gspo.rewards.exact_match import ExactMatch
from roll_gspo.rewards.final_answer import text_after_thinking
from roll_gspo.rewards.format import Format
from roll_gspo.rewards.ifeval import IfEval
from roll_gspo.rewards.llm_judge.judge import LlmJudge
from roll_gspo.rewards.llm_judge.prompt import JudgePrompt
from roll_gspo.rewards.math_rule import MathRule
from roll_gspo.rewards.multiple_choice import CrossThinkQa, MultipleChoiceBoxed

OPENED = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        ("", "7", "7"),
        ("", "<think>a</think> 7", " 7"),
        ("", "a</think>b</think>7", "7"),
        ("", "<think>a <think>b</think>7", "7"),
        ("", "<think>a", ""),
        ("", "7 <think>or 8", ""),
        ("", "<think>a</think>7 <think>or 8", ""),
        ("", "<think>a</think>", ""),
        (OPENED, "a</think>7", "7"),
        (OPENED, "<think>a</think>7", "7"),
        (OPENED, "7", ""),
        (OPENED, "<think>7", ""),
        (OPENED + "\n</think>\n\n", "7", "7"),
        ("Write <think> first.", "7", "7"),
    ],
)
def test_text_after_thinking(prompt: str, response: str, text: str) -> None:
    assert text_after_thinking(prompt, response) == text


ROW = {"test_cases": [{"input": "", "output": "5"}]}
UNIT_TEST = {"test_cases": [{"assert_code": "assert ',' not in {response}"}], "case_type": "text"}
NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
# (reward, correct answer, ground truth, row, score without an answer)
CASES: list[tuple[Callable[[], Any], str, str, dict[str, Any], float]] = [
    (MathRule, "\\boxed{7}", "7", {}, 0),
    (MultipleChoiceBoxed, "\\boxed{B}", "B", {}, 0),
    (CrossThinkQa, "\\boxed{B}", "B", {}, -1),
    (IfEval, "none here", "", NO_COMMA, 0),
    (lambda: Format("boxed"), "\\boxed{7}", "", {}, 0),
    (ExactMatch, "It is: 7", "7", {}, 0),
    (lambda: ExactMatch(""), "7", "7", {}, 0),
    (CodeSandbox, "```python\nprint(5)\n```", "", ROW, 0),
    (lambda: CodeSandbox(allow_bare=True), "print(5)", "", ROW, 0),
    (CodeSandbox, "letters", "", UNIT_TEST, 0),
]


@pytest.mark.parametrize(("reward", "answer", "ground_truth", "row", "none"), CASES)
def test_thinking_that_is_not_closed_has_no_answer(reward, answer, ground_truth, row, none) -> None:
    def score(prompt: str, response: str) -> float:
        return rule(prompt, response, ground_truth, **row).score

    rule = reward()
    assert score("", f"<think>so</think>{answer}") == score(OPENED, f"so</think>{answer}") == score("", answer) == 1
    assert score("", f"<think>{answer}") == score(OPENED, answer) == score("", f"<think>{answer}</think>") == none


def test_judge_does_not_grade_thinking() -> None:
    judge = LlmJudge("http://127.0.0.1:1/v1", "none", max_retries=0)
    assert judge("", "<think>It is 7.", "7") == judge(OPENED, "It is 7.", "7") == 0
    prompt = JudgePrompt("{{ response }}|{{ full_response }}")
    assert prompt.render("", "<think>a</think>7", "", {}) == "7|< think>a< /think>7"


def test_rewards_see_special_tokens_without_end_and_padding() -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|turn_end|>"]})
    ids = tokenizer.encode("<think>a</think>b<|turn_end|>", add_special_tokens=False)
    end, padding, turn_end = tokenizer.eos_token_id, tokenizer.pad_token_id, ids[-1]
    assert response_text(tokenizer, [*ids, end, padding, padding], (turn_end,)) == "<think>a</think>b"
    assert response_text(tokenizer, ids[:-1]) == "<think>a</think>b"
