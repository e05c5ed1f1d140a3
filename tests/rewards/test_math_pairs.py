"""`math_rule` on pairs of answers (`math_pairs.jsonl`), each in both directions, and on answers in plain text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("math_verify")
from roll_gspo.rewards.math_answers import Literal, read_literal
from roll_gspo.rewards.math_equality import equal_literals
from roll_gspo.rewards.math_rule import MathRule

PAIRS = [json.loads(line) for line in Path(__file__).with_name("math_pairs.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def rule() -> MathRule:
    return MathRule(timeout_s=60)  # so that a busy machine does not cause timeouts


def test_equal_pairs_score_1_and_different_pairs_score_0_in_both_directions(rule: MathRule) -> None:
    assert len(PAIRS) >= 300 and min(Counter(pair["kind"] for pair in PAIRS).values()) >= 2
    wrong = [
        (pair["kind"], gold, answer)
        for pair in PAIRS
        for gold, answer in ((pair["gold"], pair["answer"]), (pair["answer"], pair["gold"]))
        if rule("", f"So \\boxed{{{answer}}}.", gold).score != pair["equal"]
    ]
    assert not wrong, wrong[:20]


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("0.3333333", "1/3", True), ("0.33333", "1/3", False), ("0.333333", "1/3", True), ("2", "2.000001", True),
        ("1000000", "1000001.0", False), ("1000000.5", "1000001.0", True), ("1000000.5", "1000003.0", False),
        ("1/3", "1000000/3000001", False), ("0.0000001", "0.0000002", False), ("0", "0.0000001", False),
    ],
)  # fmt: skip
def test_rationals_are_compared_exactly_and_decimals_relatively(first: str, second: str, equal: bool) -> None:
    one, other = read_literal(first), read_literal(second)
    assert isinstance(one, Literal) and isinstance(other, Literal)
    assert equal_literals(one, other) == equal_literals(other, one) == equal


@pytest.mark.parametrize(
    ("response", "gold", "score"),
    [
        ("Answer:34", "34", 1), ("**Answer:** 34.", "34", 1), ("所以答案是5。", "5", 1), ("答案：5", "5", 1),
        ("共需要12天", "12", 1), ("答えは5です。", "5", 1), ("所以答案是 $5$。", "5", 1), ("정답은 5입니다.", "5", 1),
        ("答案为34个", "34", 1), ("故答案为：\\frac{1}{2}", "0.5", 1), ("所以x=5。", "5", 1), ("结果为3/4", "0.75", 1),
        ("Answer:(3,4)", "(3,4)", 1), ("最终答案：**5**", "5", 1), ("合은 25입니다", "25", 1),
        ("The answer is −5.", "-5", 1),
        ("The answers are 3, 4 and 5.", "5,4,3", 1), ("x = 3 or x = 4", "3, 4", 1), ("Answer: 10^-5", "1e-05", 1),
        ("答案是7。", "5", 0), ("因此有３４种。", "34", 1),
        ("The answer is 2 2/3.", "\\frac{8}{3}", 1), ("The answer is 2 2/3.", "2", 0),
        ("The answer is 3 + 4 = 7.", "7", 1), ("The answer is 7, since 3 + 5 is 8.", "7", 1),
        ("To answer this, add 3 and 4. He has 7", "7", 1), ("The final answer is 7.\n\nI checked 8 cases.", "7", 1),
        ("The answer is 2 hours 30 minutes.", "2\\text{ hours }30\\text{ minutes}", 1),
        ("The answer is 2 hours 45 minutes.", "2\\text{ hours }30\\text{ minutes}", 0),
        ("The answer is 8 p.m.", "8\\text{ a.m.}", 0), ("The answer is 8 p.m.", "8\\text{ p.m.}", 1),
        ("The answer is x=3, y=4.", "x=3,y=4", 1), ("The answer is x=4, y=3.", "x=3,y=4", 0),
        ("The answer is (3, 4).", "(3,4)", 1), ("The answer is 1,234 apples", "1234", 1),
        ("It costs $18 and then $20", "20", 1), ("It costs $18.", "18", 1), ("It is $18$%.", "18\\%", 1),
        ("We get 1.2e-07.", "0.00000012", 1), ("Model XDY2K", "2", 0), ("\\[\nx = 5\n\\]", "5", 1),
        ("It is 7.\n" + "\\quad " * 500, "7", 1), ("\\boxed{1" + " " * 1000 + "x}", "x", 1),
        ("7", "The answer is $7$", 1), ("7", "So the answer is 7.", 1),
        ("\\boxed{" + "7" * 5000 + "}", "7" * 5000, 1), ("\\boxed{" + "7" * 5000 + "}", "7" * 4999, 0),
    ],
)  # fmt: skip
def test_answer_is_found_in_text(rule: MathRule, response: str, gold: str, score: float) -> None:
    assert rule("", response, gold).score == score
