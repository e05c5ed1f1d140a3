"""A job of a reward pool: requests, and their results as they arrive."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple

from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.failures import FailureSummary

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 60.0


class RewardTime(NamedTuple):
    """Busy seconds summed over reward processes: before the caller waited for the results, and in total."""

    hidden_s: float
    total_s: float


@dataclass(eq=False, slots=True)
class Sample:
    """A request without a result.

    Attributes:
        job: job of the request.
        key: key of its result.
        number: position in the order of `ScoringJob.submit`.
        request: the request.
        crashed: True if its worker died once.
        isolated: True if its batch timed out or crashed. It is scored alone.
    """

    job: ScoringJob
    key: int
    number: int
    request: RewardRequest
    crashed: bool = False
    isolated: bool = False


class ScoringJob:
    """Requests to score, which may be submitted while the first ones are being scored.

    The job holds a request until it has a result, and a result until `take` returns it. Any thread may call the methods
    of this class. As a context manager, the job is cancelled at the end of the block unless it has ended.

    Args:
        key: key path of the reward's block, for log lines.
        wake: function that wakes the pool.
        changed: notified when results arrive and when the job ends.
        starts_workers: start all workers; the job ends only once their rewards are built.

    Attributes:
        ended: set once no further result can arrive.
        error: the error that ended the job, or None.
        queue: the requests that the pool has seen.
        starts_workers: True if the job still has to start all workers.
        awaits_workers: True if the job has started all workers and waits until their rewards are built.
    """

    def __init__(
        self, key: str, wake: Callable[[], None], changed: threading.Condition, starts_workers: bool = False
    ) -> None:
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.starts_workers = starts_workers
        self.awaits_workers = False
        self.queue = JobQueue(self)
        self._key = key
        self._wake = wake
        self._changed = changed  # its lock guards the attributes below
        self._num_submitted = 0
        self._num_scored = 0
        self._results: list[tuple[int, RewardResult]] = []
        self._finished_at: float | None = None
        self._time = RewardTime(0.0, 0.0)
        self._failures = FailureSummary(key)
        self._cancelled = False
        self._incoming: SimpleQueue[Sample] = SimpleQueue()

    def __enter__(self) -> ScoringJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        if not self.ended.wait(_END_TIMEOUT_S) and error is None:
            raise TimeoutError(f"{self._key}: scoring did not stop within {_END_TIMEOUT_S:g} s")

    @property
    def num_submitted(self) -> int:
        """Number of requests."""
        return self._num_submitted

    @property
    def num_scored(self) -> int:
        """Number of requests that have a result, including results that were taken."""
        return self._num_scored

    @property
    def has_results(self) -> bool:
        """True if `take` would return results."""
        return bool(self._results)

    @property
    def time(self) -> RewardTime:
        """Time that workers spent on this job so far. Time before `finish` is hidden."""
        return self._time

    def submit(self, key: int, request: RewardRequest) -> None:
        """Add a request without blocking; its result has `key`."""
        with self._changed:
            number = self._num_submitted
            self._num_submitted += 1
        self._incoming.put(Sample(self, key, number, request))
        self._wake()

    def take(self) -> list[tuple[int, RewardResult]]:
        """Return (key, result) of the results that arrived since the last call, in any order."""
        with self._changed:
            taken, self._results = self._results, []
        return taken

    def finish(self) -> None:
        """Declare that no more requests will be submitted. The job ends once all have a result."""
        with self._changed:
            self._finished_at = time.monotonic()
        self._wake()

    def cancel(self) -> None:
        """End the job soon; requests without a result are dropped."""
        self._cancelled = True
        self._wake()

    def raise_failure(self) -> None:
        """Raise the error that ended the job, if any."""
        if self.error is not None:
            raise self.error

    def log_failures(self) -> None:
        """Log a summary of the samples that failed since the last call."""
        with self._changed:
            text = self._failures.take_text()
        if text is not None:
            logger.warning("%s", text)

    @property
    def cancelled(self) -> bool:
        """True if `cancel` was called."""
        return self._cancelled

    @property
    def complete(self) -> bool:
        """True if no more requests will be submitted and all have a result."""
        # `_finished_at` is read first, so that a request submitted just before `finish` is not missed.
        return self._finished_at is not None and self._num_scored == self._num_submitted

    def next_submitted(self) -> Sample | None:
        """Remove and return the oldest request that the pool has not seen, or None."""
        try:
            return self._incoming.get_nowait()
        except Empty:
            return None

    def add_results(self, results: Sequence[tuple[Sample, RewardResult]], spans: Sequence[tuple[float, float]]) -> None:
        """Add results.

        Args:
            results: samples with their results.
            spans: (start, end) of the times that workers spent, in seconds of `time.monotonic()`.
        """
        with self._changed:
            hidden, total = self._time
            for start, end in spans:
                total += end - start
                hidden += end - start if self._finished_at is None else max(0.0, min(end, self._finished_at) - start)
            self._time = RewardTime(hidden, total)
            for sample, result in results:
                self._failures.add(sample.number, sample.request, result)
                self._results.append((sample.key, result))
            self._num_scored += len(results)
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """End the job, with an error or None."""
        self.log_failures()
        with self._changed:
            self.error = error
            self.ended.set()
            self._changed.notify_all()


class JobQueue:
    """The requests of a job that the pool has seen. Only the pool's thread uses it.

    Args:
        job: the job.

    Attributes:
        pending: samples that are not assigned to a worker.
        num_unfinished: number of samples without a result.
        num_served: number of samples that were assigned, counted so that jobs take turns.
    """

    def __init__(self, job: ScoringJob) -> None:
        self.pending: deque[Sample] = deque()
        self.num_unfinished = 0
        self.num_served = 0
        self._job = job
        self._results: list[tuple[Sample, RewardResult]] = []
        self._spans: list[tuple[float, float]] = []

    def drain(self, num_served: int) -> None:
        """Move submitted requests to `pending`.

        Args:
            num_served: `num_served` of the job that was served last. A job that had nothing to assign starts there.
        """
        waited = bool(self.pending)
        while (sample := self._job.next_submitted()) is not None:
            self.pending.append(sample)
            self.num_unfinished += 1
        if self.pending and not waited:
            self.num_served = max(self.num_served, num_served)

    def take(self, limit: int) -> list[Sample]:
        """Remove and return up to `limit` pending samples; an isolated sample is returned alone."""
        taken = [self.pending.popleft()]
        while self.pending and len(taken) < limit and not taken[0].isolated and not self.pending[0].isolated:
            taken.append(self.pending.popleft())
        self.num_served += len(taken)
        return taken

    def requeue(self, samples: Sequence[Sample]) -> None:
        """Put samples back at the front of `pending`, in the given order."""
        self.pending.extendleft(reversed(samples))
        self.num_served -= len(samples)

    def add_result(self, sample: Sample, result: RewardResult) -> None:
        """Add a result, which the job gets by `publish`."""
        self.num_unfinished -= 1
        self._results.append((sample, result))

    def add_span(self, start: float, end: float) -> None:
        """Add a time that a worker spent on the job."""
        self._spans.append((start, end))

    def publish(self) -> None:
        """Pass new results to the job."""
        if self._results or self._spans:
            self._job.add_results(self._results, self._spans)
            self._results, self._spans = [], []
