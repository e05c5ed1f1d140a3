"""Background scoring of all domains at once while generation continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.job import JobCancelled, ScoringJob
from roll_gspo.rewards.pool import RewardPool

_NAP_S = 0.1
_CANCEL_TIMEOUT_S = 60.0


class RewardTime(NamedTuple):
    """Busy seconds summed over reward processes: before `Scoring.results` was called, and in total."""

    hidden_s: float
    total_s: float


@dataclass
class _Background:
    """Scoring job of one domain and the thread that runs it."""

    pool: RewardPool
    job: ScoringJob
    thread: threading.Thread
    indices: list[int]
    results: list[RewardResult] | None = None
    error: BaseException | None = None

    def run(self) -> None:
        """Run the job; the thread's target."""
        try:
            self.results = self.pool.run(self.job)
        except BaseException as error:
            self.error = error


class Scoring:
    """Context in which samples are scored by the pools. No thread outlives the `with` block.

    Args:
        pools: pool of each domain; each is in use until the block ends.
    """

    def __init__(self, pools: Mapping[str, RewardPool]) -> None:
        self._pools = pools
        self._running: dict[str, _Background] = {}
        self.time = RewardTime(0.0, 0.0)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for domain in self._running.values():
            domain.job.cancel()  # nothing to cancel if `results` has returned
        for name, domain in self._running.items():
            domain.thread.join(_CANCEL_TIMEOUT_S)
            if domain.thread.is_alive() and error is None:
                raise TimeoutError(f"rewards.{name}: scoring did not stop within {_CANCEL_TIMEOUT_S:g} s")

    @property
    def num_scored(self) -> int:
        """Number of samples that have a result."""
        return sum(len(domain.job.results) for domain in self._running.values())

    def submit(self, index: int, domain: str, request: RewardRequest) -> None:
        """Queue a sample for scoring and return at once.

        Args:
            index: position of its result.
            domain: reward block that scores the sample.
            request: the sample.

        Raises:
            ConfigError, MissingDependencyError, RewardError: scoring has failed in the background.
        """
        running = self._running.get(domain) or self._start(domain)
        self._raise_failure()
        running.indices.append(index)
        running.job.submit(request)

    def results(self, progress: Callable[[int, int], None] | None = None) -> list[RewardResult]:
        """Wait for all submitted samples and return their results by `index`.

        Each wait is bounded by the sample's timeout.

        Args:
            progress: called with (finished samples, all samples).

        Raises:
            ConfigError, MissingDependencyError, RewardError: a reward process cannot be started.
        """
        called = time.monotonic()
        for domain in self._running.values():
            domain.job.finish()
        total = sum(len(domain.indices) for domain in self._running.values())
        waited_for = list(self._running.values())
        while waited_for:
            # No timeout here: the pool has a deadline for every sample and every process start.
            waited_for[0].thread.join(_NAP_S)
            waited_for = [domain for domain in waited_for if domain.thread.is_alive()]
            self._raise_failure()
            if progress is not None:
                progress(self.num_scored, total)
        spans = [span for domain in self._running.values() for span in domain.job.busy_spans]
        self.time = RewardTime(
            sum(max(0.0, min(end, called) - begin) for begin, end in spans), sum(end - begin for begin, end in spans)
        )
        found = {
            index: result
            for domain in self._running.values()
            for index, result in zip(domain.indices, domain.results or (), strict=True)
        }
        return [found[index] for index in sorted(found)]

    def _start(self, domain: str) -> _Background:
        pool = self._pools[domain]
        job = pool.new_job()
        started = _Background(pool, job, threading.Thread(), [])
        # Daemon thread: an interpreter that exits inside the block must not wait for it.
        started.thread = threading.Thread(target=started.run, name=f"score {domain}", daemon=True)
        self._running[domain] = started
        started.thread.start()
        return started

    def _raise_failure(self) -> None:
        for domain in self._running.values():
            if domain.error is not None and not isinstance(domain.error, JobCancelled):
                raise domain.error
