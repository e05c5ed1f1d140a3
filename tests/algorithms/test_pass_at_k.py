"""pass@k and maj@k: by hand, and against every subset one by one."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from roll_gspo.algorithms.pass_at_k import maj_at_k, pass_at_k


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)  # 3 of the 6 pairs hold the correct one
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert (pass_at_k(8, 0, 8), pass_at_k(8, 8, 1), pass_at_k(8, 1, 8)) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("num_samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples: int) -> None:
    for correct in range(num_samples + 1):
        samples = [i < correct for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(combinations(samples, k))
            assert pass_at_k(num_samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_impossible_counts_are_refused() -> None:
    for samples, correct, k in ((4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match=r"choose 1 to 4|cannot be correct"):
            pass_at_k(samples, correct, k)
    with pytest.raises(ValueError, match="k is 3, but there are 2 samples"):
        maj_at_k(["a", "b"], [0, 1], 3)


def test_maj_at_k_by_hand() -> None:
    answers, scores = ["7", "7", "8", None], [1.0, 1.0, 0.0, 0.0]
    assert maj_at_k(answers, scores, 4) == 1.0
    # the pairs: 77 wins; 78 and 78 tie (1/2 each); 7- and 7- win; 8- loses
    assert maj_at_k(answers, scores, 2) == pytest.approx((1 + 0.5 + 0.5 + 1 + 1 + 0) / 6)
    assert maj_at_k(answers, scores, 1) == pytest.approx(2 / 4)
    assert maj_at_k([None, None], [1.0, 1.0], 2) == 0.0, "who gives no answer does not vote"
    assert maj_at_k(["7", "7"], [1.0, 0.5], 2) == 0.75, "equal answers that score differently share"


def over_all_subsets(answers: list[str | None], scores: list[float], k: int) -> float:
    """The definition, without counting: every subset votes."""
    total, subsets = 0.0, list(combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        winners = [a for a in votes if votes[a] == max(votes.values())]
        for winner in winners:
            own = [scores[i] for i in subset if answers[i] == winner]
            total += sum(own) / len(own) / len(winners)
    return total / len(subsets)


CASES = [
    (["a", "a", "b", "b", "c", None, "a"], [1, 1, 0, 0, 0, 0, 1]),
    (["a", "b", "c", "d", "e", "f"], [0, 0, 1, 0, 0, 0]),
    (["a", "a", "b", "b", "c", "c", "c", None], [0.5, 0.25, 1, 0, -1, 2, 0, 3]),
    ([None, None, "a", "b", "b", "a", "b", "a"], [0, 0, 1, 0, 0, 1, 0, 1]),
]


@pytest.mark.parametrize(("answers", "scores"), CASES)
def test_maj_at_k_is_the_mean_over_all_subsets(answers: list[str | None], scores: list[float]) -> None:
    for k in range(1, len(answers) + 1):
        assert maj_at_k(answers, scores, k) == pytest.approx(over_all_subsets(answers, scores, k))


@pytest.mark.timeout(10)
def test_hundreds_of_samples_with_many_answers_are_counted_at_once() -> None:
    answers = [str(i**3 % 257) if i % 3 else str(i % 5) for i in range(256)]
    assert maj_at_k(answers, [1.0] * 256, 128) == pytest.approx(1), "some answer wins"


def test_order_of_samples_does_not_matter() -> None:
    answers, scores = CASES[0]
    assert maj_at_k(answers[::-1], scores[::-1], 3) == pytest.approx(maj_at_k(answers, scores, 3))
