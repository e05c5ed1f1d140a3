"""`math_rule` on all answers of GSM8K and MATH-500 in ten surface forms, and on wrong answers derived from them."""

from __future__ import annotations

import pytest
from math_answers import DATA, FORMULA_FORMS, NUMBER_FORMS, gsm8k, math_500, restyled, wrong_answers

pytest.importorskip("math_verify")
from roll_gspo.rewards.math_rule import MathRule

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmark files in ../shared/data")
SLICES = [
    pytest.param(slice(None, None, 12), id="every_12th"),
    pytest.param(slice(None), id="all", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def rule() -> MathRule:
    return MathRule(timeout_s=60)  # so that a busy machine does not cause timeouts


def failures(rule: MathRule, answers: list[str], forms: tuple[str, ...]) -> tuple[int, list[str]]:
    """Return (number of scored responses, descriptions of those that do not score 1)."""
    responses = [
        (form.format(written), gold.replace(",", "") if forms is NUMBER_FORMS else gold)
        for gold in answers
        for index, form in enumerate(forms)
        for written in [gold if index % 2 else restyled(gold)]
    ]
    return len(responses), [f"{r!r} for {g!r}" for r, g in responses if rule("", r, g).score != 1]


@pytest.mark.parametrize("part", SLICES)
def test_gsm8k_answers_score_1_in_ten_forms(rule, part):
    answers = gsm8k()
    assert len(answers) == 1319 and len(set(NUMBER_FORMS)) == 10
    scored, failed = failures(rule, answers[part], NUMBER_FORMS)
    assert scored == 10 * len(answers[part]) and not failed, failed[:20]


@pytest.mark.parametrize("part", SLICES)
def test_math_500_answers_score_1_in_ten_forms(rule, part):
    answers = math_500()
    assert len(answers) == 500 and len(set(FORMULA_FORMS)) == 10
    scored, failed = failures(rule, answers[part], FORMULA_FORMS)
    assert scored == 10 * len(answers[part]) and not failed, failed[:20]


def test_wrong_answers_score_0(rule):
    pairs = [
        *((gold.replace(",", ""), wrong, NUMBER_FORMS) for gold, wrong in wrong_answers(gsm8k(), 100)),
        *((gold, wrong, FORMULA_FORMS) for gold, wrong in wrong_answers(math_500(), 100)),
    ]
    assert len(pairs) == 200
    for index, (gold, wrong, forms) in enumerate(pairs):
        response = forms[index % 10].format(wrong)
        assert rule("", response, gold).score == 0, (response, gold)
        assert rule("", forms[index % 10].format(gold), gold).score == 1, gold  # the form alone does not score 0


@pytest.mark.parametrize("part", SLICES)
def test_output_answer_is_equal_for_equal_answers_only(rule, part):
    for gold, wrong in wrong_answers(math_500(), 100)[part]:
        against = r"\text{none}" if "text" not in gold else "5"
        boxed, inline, other = (
            rule("", response, against).answer
            for response in (f"\\boxed{{{restyled(gold)}}}", f"It is ${gold}$.", f"\\boxed{{{wrong}}}")
        )
        assert boxed == inline != other, (gold, boxed, inline, other)
