"""Scoring of samples of all domains in the background, while generation continues."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.job import RewardTime, ScoringJob
from roll_gspo.rewards.pool import RewardPool

_NAP_S = 0.1


class Scoring:
    """Context in which the pools score samples. Samples without a result are dropped at its end.

    Several contexts may be open, each used by one thread. They share the pools fairly. Take results while others are
    being computed (`take_finished`), or all at the end (`results`).

    Args:
        pools: pool of each domain.
        start_servers: starts servers of judges that died, at each `next_step`.
    """

    def __init__(self, pools: Mapping[str, RewardPool], start_servers: Callable[[], None] = lambda: None) -> None:
        self._pools = pools
        self._start_servers = start_servers
        self._jobs: dict[str, ScoringJob] = {}
        self._context = ExitStack()
        self._changed = threading.Condition()
        self._num_taken = 0

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self._jobs.values():
            job.cancel()  # all of them, before the first is waited for
        self._context.__exit__(kind, error, trace)

    @property
    def num_scored(self) -> int:
        """Number of samples that have a result, including results that were taken."""
        return sum(job.num_scored for job in self._jobs.values())

    @property
    def num_unfinished(self) -> int:
        """Number of submitted samples whose result has not been taken."""
        return sum(job.num_submitted for job in self._jobs.values()) - self._num_taken

    @property
    def time(self) -> RewardTime:
        """Busy time of the reward processes so far. Time before `results` was called is hidden."""
        times = [job.time for job in self._jobs.values()]
        return RewardTime(sum(time.hidden_s for time in times), sum(time.total_s for time in times))

    def submit(self, index: int, domain: str, request: RewardRequest) -> None:
        """Queue a sample for scoring and return at once.

        Args:
            index: number by which the caller knows its result.
            domain: reward block that scores the sample.
            request: the sample.

        Raises:
            ConfigError, MissingDependencyError, RewardError: scoring has failed in the background.
        """
        job = self._jobs.get(domain)
        if job is None:
            job = self._jobs[domain] = self._context.enter_context(self._pools[domain].open(self._changed))
        self._raise_failure()
        job.submit(index, request)

    def take_finished(self, timeout_s: float = 0.0) -> list[tuple[int, RewardResult]]:
        """Return (index, result) of samples that were scored since the last call, in any order.

        A result that was taken is not kept, so that a context may be open for the whole run.

        Args:
            timeout_s: seconds to wait for a result if there is none. 0 returns at once.

        Raises:
            ConfigError, MissingDependencyError, RewardError: scoring has failed in the background.
        """
        with self._changed:
            if timeout_s > 0 and self.num_unfinished:
                self._changed.wait_for(self._has_news, timeout_s)
        self._raise_failure()
        return self._take()

    def results(self, progress: Callable[[int, int], None] | None = None) -> list[RewardResult]:
        """Wait for all submitted samples and return the results that were not taken, by `index`.

        Each wait is bounded by the sample's timeout. No sample can be submitted afterwards.

        Args:
            progress: called with (finished samples, all samples).

        Raises:
            ConfigError, MissingDependencyError, RewardError: a reward process cannot be started.
        """
        for job in self._jobs.values():
            job.finish()
        total = sum(job.num_submitted for job in self._jobs.values())
        waited_for = list(self._jobs.values())
        while waited_for:
            # No timeout here: the pool has a deadline for every sample and every process start.
            waited_for[0].ended.wait(_NAP_S)
            waited_for = [job for job in waited_for if not job.ended.is_set()]
            self._raise_failure()
            if progress is not None:
                progress(self.num_scored, total)
        found = dict(self._take())
        return [found[index] for index in sorted(found)]

    def next_step(self) -> None:
        """Begin a training step of a context that stays open for several.

        Log the samples that failed since the last call, restart the limits of printed output and servers that died.

        Raises:
            RewardError: a server of a judge does not start.
        """
        self._start_servers()
        for domain, job in self._jobs.items():
            job.log_failures()
            self._pools[domain].next_step()

    def _take(self) -> list[tuple[int, RewardResult]]:
        taken = [keyed for job in self._jobs.values() for keyed in job.take()]
        self._num_taken += len(taken)
        return taken

    def _has_news(self) -> bool:
        return any(job.has_results or job.error is not None for job in self._jobs.values())

    def _raise_failure(self) -> None:
        for job in self._jobs.values():
            job.raise_failure()
