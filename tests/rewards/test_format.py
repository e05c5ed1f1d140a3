"""`format`: named forms, regular expressions, and catastrophic backtracking."""

from __future__ import annotations

import pytest

from roll_gspo.errors import ConfigError
from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec
from roll_gspo.rewards.format import Format

GOOD = "<think>two and\ntwo</think>\n<answer> 4 < 5 </answer>"


@pytest.mark.parametrize(
    ("pattern", "response", "score"),
    [
        ("think_answer", GOOD, 1),
        ("think_answer", f"\n{GOOD}\n", 1),
        ("think_answer", "<think></think><answer>4</answer>", 1),
        ("think_answer", GOOD + " and more", 0),
        ("think_answer", "So " + GOOD, 0),
        ("think_answer", "<think>a</think><answer> </answer>", 0),
        ("think_answer", "<think>a</think><answer></answer>", 0),
        ("think_answer", "<think>a</think>4", 0),
        ("think_answer", "<answer>4</answer><think>a</think>", 0),
        ("think_answer", "<think>a<think>b</think><answer>4</answer>", 0),
        ("think_answer", "<think>a</think><answer>3</answer><answer>4</answer>", 0),
        ("think_answer", "<think>a<answer>3</answer></think><answer>4</answer>", 0),
        ("think_answer", "", 0),
        ("think", "<think>a</think> 4", 1),
        ("think", "<think>a</think>", 0),
        ("think", "a</think> 4", 0),
        ("think", "<think>a</think> 4 </think>", 0),
        ("boxed", r"So \boxed{4}.", 1),
        ("boxed", r"<think>\boxed{3}</think>So \boxed{\frac{1}{2}}.", 1),
        ("boxed", r"\boxed{3} or \boxed{4}", 0),
        ("boxed", r"<think>\boxed{3}</think>So \boxed{4", 0),
        ("boxed", r"\boxed{ }", 0),
        ("boxed", r"\boxed{4", 0),
        ("boxed", "4", 0),
        (r"^Answer: \d+$", "Answer: 42", 1),
        (r"Answer: \d+", "Answer: 42.", 0),
        (r"a.b", "a\nb", 1),
    ],
)
def test_whole_response_must_have_the_form(pattern, response, score):
    assert Format(pattern)("", response, "ignored", id="1").score == score


def test_think_tag_at_the_end_of_the_prompt_counts():
    rule = Format("think")
    assert rule("<|assistant|>\n<think>\n", "a</think> 4", "").score == 1
    assert rule("<|assistant|>\n", "a</think> 4", "").score == 0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (GOOD, 1),
        ("<answer>4</answer><think>a</think>", 0.4),
        ("<think>a</think>", 0.2),
        ("4", 0),
        ("<think><think>", 0),
    ],
)
def test_partial_credit_counts_tags_that_occur_once(response, score):
    assert Format("think_answer", partial_credit=0.4)("", response, "").score == pytest.approx(score)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format_pattern": "think_anser"}, "^format_pattern: 'think_anser' .*'think_answer'"),
        ({"format_pattern": "(a"}, r"^format_pattern: '\(a' "),
        ({"format_pattern": "a+", "partial_credit": 0.5}, r"^format: partial_credit .*think_answer and think .*'a\+'"),
        ({"format_pattern": "boxed", "partial_credit": 0.5}, "^format: partial_credit .*'boxed'"),
        ({"partial_credit": 1}, "^format: partial_credit is 1"),
    ],
)
def test_wrong_arguments_raise(arguments, match):
    with pytest.raises(ConfigError, match=match):
        Format(**arguments)


def test_catastrophic_backtracking_fails_only_its_sample():
    fine, endless = RewardRequest("", "aab", ""), RewardRequest("", "a" * 60 + "c", "")
    spec = reward_spec("format", {"format_pattern": "(a+)+b"}, "rewards.f")
    with RewardPool(spec, 1, 2.0, "rewards.f") as pool:
        first, slow, last = pool.score([fine, endless, fine])
    assert (first.score, last.score, slow.score) == (1, 1, 0)
    assert slow.failed and not first.failed and not last.failed
