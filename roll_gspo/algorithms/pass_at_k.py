"""pass@k and maj@k of a prompt from n samples: exact expectations over all choices of k samples.

Nothing is drawn at random. The order of the samples does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that k of the samples, drawn without replacement, include a correct one.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    _check(num_samples, k)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k}: {num_correct} of {num_samples} samples cannot be correct")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def maj_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """Return the expected score of the majority answer of k samples, drawn without replacement.

    Samples without an answer (None) abstain; if all k abstain, the score is 0. Tied answers win with equal probability.
    If samples with the same answer have different scores (a reward may depend on more than the answer), the answer has
    their mean score.

    Args:
        answers: one per sample; equal texts are equal answers.
        scores: one per sample.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    _check(len(answers), k)
    groups: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            groups.setdefault(answer, []).append(score)
    counts = [len(group) for group in groups.values()]
    abstaining = len(answers) - sum(counts)
    means: dict[int, float] = {}  # by count, summed over its answers: they win with equal probability
    for group in groups.values():
        means[len(group)] = means.get(len(group), 0.0) + sum(group) / len(group)
    expected = 0.0
    for own, mean in means.items():
        if mean:
            others = counts.copy()
            others.remove(own)
            expected += mean * _chance_to_win(own, others, abstaining, k)
    return expected


def _chance_to_win(own: int, others: Sequence[int], abstaining: int, k: int) -> float:
    """Return the probability that an answer with `own` samples wins if k of all are drawn; ties are shared."""
    total = 0.0
    num_subsets = math.comb(own + sum(others) + abstaining, k)
    for votes in range(1, min(own, k) + 1):
        for tied, ways in _ways_below(others, abstaining, k - votes, votes).items():
            total += math.comb(own, votes) * ways / num_subsets / (tied + 1)
    return total


def _ways_below(others: Sequence[int], abstaining: int, k: int, votes: int) -> dict[int, int]:
    """Count the ways to draw k of the other samples so that no answer has more than `votes`.

    Returns:
        The number of ways by the number of answers that have exactly `votes`.
    """
    free = abstaining + sum(count for count in others if count < votes)  # any number of these may be drawn
    ways = {(0, 0): 1}  # (number drawn, answers with exactly `votes`) -> number of ways
    for count in (count for count in others if count >= votes):
        following: dict[tuple[int, int], int] = {}
        for (drawn, tied), number in ways.items():
            for took in range(min(count, votes, k - drawn) + 1):
                key = (drawn + took, tied + (took == votes))
                following[key] = following.get(key, 0) + number * math.comb(count, took)
        ways = following
    by_tied: dict[int, int] = {}
    for (drawn, tied), number in ways.items():
        by_tied[tied] = by_tied.get(tied, 0) + number * math.comb(free, k - drawn)
    return by_tied


def _check(num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, but there are {num_samples} samples; choose 1 to {num_samples}")
