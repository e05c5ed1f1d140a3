"""Warnings about rewards that look broken. A loss curve does not reveal them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from roll_gspo.batch import Prompt
from roll_gspo.config.environment_table import AGENT
from roll_gspo.errors import PlayError, RewardError
from roll_gspo.pipelines.repeats import is_due
from roll_gspo.rewards.base import RewardResult

logger = logging.getLogger(__name__)
FEW_STEPS = 3
FAILED_SHARE = 0.5
_MAX_QUOTED_CHARS = 500


class FirstSample(NamedTuple):
    """A prompt and the text of its first response."""

    prompt: Prompt
    response: str


class RewardAlarm:
    """Warn about domains in which all scores are equal for `FEW_STEPS` consecutive steps, or most rewards fail.

    The warning repeats each time that the number of steps doubles. A resumed run counts from its start.
    """

    def __init__(self) -> None:
        self._equal: Counter[str] = Counter()
        self._failing: Counter[str] = Counter()

    def check(self, step: int, domains: Sequence[str], results: Sequence[RewardResult]) -> None:
        """Check all samples of a step; `domains` and `results` have one entry per sample."""
        by_domain: dict[str, list[RewardResult]] = {}
        for domain, result in zip(domains, results, strict=True):
            by_domain.setdefault(domain, []).append(result)
        for domain, scored in by_domain.items():
            self._check_failures(step, domain, scored)
            self._check_spread(step, domain, [result.score for result in scored if result.failed is None])

    def _check_failures(self, step: int, domain: str, scored: Sequence[RewardResult]) -> None:
        reasons = Counter(result.failed for result in scored if result.failed is not None)
        if reasons.total() <= FAILED_SHARE * len(scored):
            self._failing[domain] = 0
            return
        self._failing[domain] += 1
        if is_due(self._failing[domain], 1):
            reason, count = reasons.most_common(1)[0]
            logger.warning(
                "step %d: rewards.%s: %d of %d samples failed and are not trained on, most often (%d times): %s; try "
                "worker_cls on a row of the data by hand, and see timeout_s (and max_memory_mb) where it was ended",
                *(step, domain, reasons.total(), len(scored), count, reason),
            )

    def _check_spread(self, step: int, domain: str, scores: Sequence[float]) -> None:
        if len(set(scores)) > 1:
            self._equal[domain] = 0
        elif len(scores) > 1:
            self._equal[domain] += 1
            if is_due(self._equal[domain], FEW_STEPS):
                logger.warning(
                    "step %d: rewards.%s: all scores were equal in each of the last %d steps (now %g, %d samples), so "
                    "that estimators that compare samples learn nothing from them; see in rollouts/ whether responses "
                    "have the form that the reward reads (response_length cuts them?) and ground_truth is right, or "
                    "the task is too %s",
                    *(step, domain, self._equal[domain], scores[0], len(scores), "hard" if scores[0] <= 0 else "easy"),
                )


class FailedSteps:
    """Stop the run if every reward failed in several consecutive steps: nothing is trained on.

    Args:
        limit: number of such steps; None never stops.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._count = 0

    def check(self, step: int, domain: str, results: Sequence[RewardResult], first: Callable[[], FirstSample]) -> None:
        """Check all results of a step.

        Args:
            step: the step.
            domain: reward block of the first sample.
            results: results of all samples.
            first: returns the first sample.

        Raises:
            RewardError: the limit is reached; the message has the first failure, its place and its sample.
        """
        if any(result.failed is None for result in results):
            self._count = 0
            return
        self._count += 1
        if self._limit is None or self._count < self._limit:
            return
        (prompt, response), result = first(), results[0]
        text = (
            f"step {step}: all {len(results)} rewards failed in each of the last {self._count} steps "
            f"(max_failed_reward_steps {self._limit}); correct rewards.{domain}, and try it with python -m "
            f"roll_gspo.rewards try\nfirst failure: {result.failed}\n{result.traceback}"
            f"row {prompt.row.get('id', '?')}, ground truth {_short(prompt.row.get('ground_truth'))}\n"
            f"prompt: {_short(prompt.text)}\nresponse: {_short(response)}"
        )
        raise RewardError(text)


class FailedEpisodes:
    """Stop the run if many episodes of a step failed: their environment is broken, and the others are few.

    Args:
        limit: largest fraction of failed episodes; None never stops.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit

    def check(self, step: int, domains: Sequence[str], results: Sequence[RewardResult]) -> None:
        """Check all results of a step; `domains` and `results` have one entry per sample.

        Raises:
            PlayError: more episodes failed than the limit allows; the message has the most frequent cause.
        """
        failed = [(d, r) for d, r in zip(domains, results, strict=True) if r.failed is not None]
        if self._limit is None or len(failed) <= self._limit * len(results):
            return
        (domain, reason), count = Counter((d, r.failed) for d, r in failed).most_common(1)[0]
        traceback = next(r.traceback for d, r in failed if (d, r.failed) == (domain, reason))
        share = (
            f"{len(failed)} of {len(results)} episodes failed (train_env_manager.max_failed_fraction {self._limit:g})"
        )
        place = domain if domain == AGENT else f"custom_envs.{domain}"
        cause = f"{place}, {count} times: {reason}\n{traceback}".rstrip()
        raise PlayError(f"step {step}: {share}, most often in {cause}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}… ({len(text)} characters)"
