"""`math_rule` on ground truths of public benchmarks and on special cases."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec

pytest.importorskip("math_verify")
from roll_gspo.rewards.math_rule import MathRule

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmark files in ../shared/data")
NUMBER_FORMS = ("#### {}", "The answer is {}.", "So it is \\boxed{{{}}}.", "She makes **{}** in all", "It costs ${}")


@pytest.fixture(scope="module")
def rule() -> MathRule:
    return MathRule(timeout_s=60)  # so that a busy machine does not cause timeouts


def score(rule: MathRule, response: str, ground_truth: str) -> float:
    return rule(prompt="", response=response, ground_truth=ground_truth, tag="ignored").score


def ground_truths(path: str, every: int) -> list[str]:
    lines = (DATA / path).read_text(encoding="utf-8").splitlines()[::every]
    rows = [json.loads(line) for line in lines]
    return [r["ground_truth"] if "ground_truth" in r else r["answer"].rpartition("####")[2].strip() for r in rows]


@needs_data
def test_gsm8k_answer_scores_1_in_every_form_and_answer_plus_1_scores_0(rule):
    answers = ground_truths("gsm8k/test.jsonl", every=13)
    assert len(answers) > 100
    for answer in answers:
        truth = answer.replace(",", "")
        wrong = str(Fraction(truth) + 1)
        for form in NUMBER_FORMS:
            assert score(rule, "First 3 + 4 = 7. " + form.format(answer), truth) == 1, (form, answer)
            assert score(rule, f"First {truth} things. " + form.format(wrong), truth) == 0, (form, wrong)


@needs_data
def test_math_answer_scores_1_boxed_and_inline_and_another_answer_scores_0(rule):
    answers = ground_truths("math_benchmarks/math_benchmarks.jsonl", every=4)
    assert len(answers) == 140
    for answer in answers:
        for response in (f"Thus \\boxed{{{answer}}}.", f"Hence the answer is ${answer}$."):
            assert score(rule, response, answer) == 1, (response, answer)
        assert score(rule, "Thus \\boxed{123456789}.", answer) == 0, answer
    crossed = [score(rule, f"\\boxed{{{b}}}", a) for a, b in pairwise(answers) if a != b]
    assert sum(crossed) <= 1  # two neighbours have equal values


@pytest.mark.parametrize(
    ("response", "ground_truth", "expected"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{\dfrac12}", "0.5", 1),
        (r"First \boxed{3}. Wait, no. It is \boxed{4}.", "4", 1),
        (r"First \boxed{3}. Wait, no. It is \boxed{4}.", "3", 0),
        (r"\boxed{3} or \boxed{4}", "3", 0),
        (r"\boxed{3} and \boxed{4}", "4, 3", 1),
        (r"\boxed{3}, \boxed{4} and \boxed{5}", "3, 4", 0),
        (r"\boxed{3, 4}", "4", 0),
        (r"\boxed{36}", r"\$36", 1),
        (r"\boxed{\$36}", "36", 1),
        ("<think>it may be \\boxed{3}</think> It is 4", "4", 1),
        ("<think>it may be \\boxed{4}</think> It is 3", "4", 0),
        (r"\boxed{1,234}", "1234", 1),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"\boxed{4}", "The answer is $4$", 1),
        ("no number at all", "4", 0),
        ("", "4", 0),
        (r"\boxed{", "4", 0),
        (r"\boxed{}", "4", 0),
        ("(" * 2000, "4", 0),
    ],
)
def test_final_answer_is_scored(rule, response, ground_truth, expected):
    assert score(rule, response, ground_truth) == expected


@pytest.mark.parametrize("ground_truth", ["", "  "])
def test_ground_truth_without_formula_raises(rule, ground_truth):
    with pytest.raises(ValueError, match=f"^math_rule: the ground truth '{ground_truth}'"):
        score(rule, "4", ground_truth)


@pytest.mark.parametrize("timeout_s", [0, -1, 1.5])
def test_timeout_must_be_whole_seconds(timeout_s):
    with pytest.raises(ValueError, match=f"timeout_s is {timeout_s}"):
        MathRule(timeout_s)


def test_unbounded_formula_scores_0_without_a_timeout():
    unbounded = RewardRequest("", r"\boxed{9^{9^{9^9}}}", "3")
    fine = RewardRequest("", r"\boxed{3}", "3")
    with RewardPool(reward_spec("math_rule", {"timeout_s": 1}, "rewards.m"), 1, 30.0, "rewards.m") as pool:
        pool.check()
        before = pool.pids
        results = pool.score([fine, unbounded, fine])
        assert pool.pids == before
    assert [result.score for result in results] == [1, 0, 1]
    assert all(result.failed is None for result in results)
