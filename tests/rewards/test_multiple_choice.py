"""`multiple_choice_boxed` and `crossthinkqa`: parsing of option letters, and scores."""

from __future__ import annotations

import pytest

from roll_gspo.errors import ConfigError
from roll_gspo.rewards.multiple_choice import CrossThinkQa, MultipleChoiceBoxed, option_letters


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        *((form, "B") for form in ("B", " B ", "(B)", "[B]", "b", "(b)", "B.", "(B).", r"\text{B}", r"\text{(B)}")),
        *((form, "B") for form in (r"\textbf{(B)}", r"\mathrm{B}", r"{B}", "$B$", "**B**", r"\ B", '"B"', "Option B")),
        *((form, "B") for form in ("B. its text", "(B) its text", "B) its text", "B: its text", r"\text{B. Its text}")),
        *((form, "B") for form in (r"\textbf{(B)}\ 12", "answer: B", "Answer is (B)", "(B)\nits text")),
        *(
            (form, "A,C")
            for form in ("A, C", "C,A", "A and C", "A, and C", "(A) and (C)", "AC", "A C", "(A)(C)", "A;C")
        ),
        *((form, "A,C") for form in (r"\text{A}, \text{C}", "A & C", '["A", "C"]')),
        *(
            (form, "B")
            for form in ("B (its text)", r"\mathsf{B}", r"\left(B\right)", r"\(B\)", "（B）", "B - its text")
        ),
        ("A, B, C and D", "A,B,C,D"),
        ("D. Both A and B", "D"),
        *(
            (form, None)
            for form in ("A or B", "(A) or (B)", "(A), (B) or (C)", "A) or B)", "A. or B", "A-C", "A (or B)")
        ),
        *((form, None) for form in ("(A) and maybe (B)", "(A)(B) text", "(A) one or (B) two", "A. one or B. two")),
        *((form, None) for form in ("", "42", "A cat", "CAB", "AA", "Yes", "ab", "x = B", "Because", "(", "B2")),
    ],
)
def test_option_letters(text, letters):
    assert option_letters(text) == letters


@pytest.mark.parametrize(
    ("response", "ground_truth", "score", "answer"),
    [
        (r"So \boxed{B}.", "B", 1, "B"),
        (r"So \boxed{\textbf{(B)}}", "(B)", 1, "B"),
        (r"First \boxed{A}, no, \boxed{B}", "B", 1, "B"),
        (r"First \boxed{A}, no, \boxed{B}", "A", 0, "B"),
        (r"<think>\boxed{A}</think> \boxed{B}", "B", 1, "B"),
        (r"<think>\boxed{B}</think> It is B", "B", 0, None),
        (r"\boxed{A} and then \boxed{B", "A", 1, "A"),
        (r"\boxed{A, C}", "AC", 1, "A,C"),
        (r"\boxed{A}", "AC", 0, "A"),
        (r"\boxed{A, B, C}", "AC", 0, "A,B,C"),
        (r"\boxed{42}", "B", 0, None),
        ("The answer is (B).", "B", 0, None),
        ("\\boxed{选项B}", "B", 1, "B"),
        ("\\boxed{选B}", "B", 1, "B"),
        ("\\boxed{正确答案：A、C}", "AC", 1, "A,C"),
        ("\\boxed{答えはBです}", "B", 1, "B"),
        ("", "B", 0, None),
    ],
)
def test_last_box_is_scored(response, ground_truth, score, answer):
    output = MultipleChoiceBoxed()("", response, ground_truth, choices=["a", "b"])
    assert (output.score, output.answer) == (score, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is (B).", "B"),
        ("the correct answer is **B**\nbecause of A", "B"),
        ("Answer: B", "B"),
        ("Perhaps the answer is A. No, the answer is B!", "B"),
        ("The answers are A and C.", "A,C"),
        ("**Answer**: B", "B"),
        (r"The answer is option \(B\).", "B"),
        ("Answer: B) its text", "B"),
        ("答案：B。", "B"),
        ("故选B", "B"),
        ("所以答案是 A，C。", "A,C"),
        ("正解はBです。", "B"),
        ("先看选项A。不选A，答案为B项", "B"),
        ("选A或B", None),
        ("The answer is (A) or (B).", None),
        ("The answer is A, or B.", None),
        ("The answer is A" + " " * 20_000 + "\n" * 20_000 + "B cat", "A"),  # must not backtrack
        ("The answer is A cat", None),
        ("The answer is Brown", None),
        (r"The answer is A. \boxed{B}", "B"),
        (r"The answer is A. \boxed{unclear}", None),
        ("B", None),
    ],
)
def test_phrase_is_scored_only_if_enabled_and_without_box(response, answer):
    assert MultipleChoiceBoxed(answer_phrase=True)("", response, "B").answer == answer
    assert MultipleChoiceBoxed()("", response, "B").answer == (answer if "boxed" in response else None)


@pytest.mark.parametrize(
    ("reward_type", "scores"),
    [("loose", (1, 1, -1, -1)), ("soft", (1, 0.5, -0.5, -1)), ("strict", (1, -1, -1, -1))],
)
def test_crossthinkqa_scores_of_each_reward_type(reward_type, scores):
    rule = CrossThinkQa(reward_type)
    responses = (r"\boxed{B}", "The answer is B.", r"\boxed{A}", "The answer is A.")
    assert tuple(rule("", response, "B").score for response in responses) == scores
    assert rule("", "no answer", "B").score == -1


@pytest.mark.parametrize("rule", [MultipleChoiceBoxed(), CrossThinkQa()])
def test_ground_truth_without_option_raises(rule):
    with pytest.raises(ValueError, match="'forty-two'"):
        rule("", r"\boxed{B}", "forty-two")


def test_unknown_reward_type_raises():
    with pytest.raises(ConfigError, match=r"reward_type 'hard'.*loose, soft, strict"):
        CrossThinkQa("hard")
