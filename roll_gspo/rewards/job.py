"""A job of a reward pool: requests, and their results as they arrive."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from roll_gspo.rewards.base import RewardRequest, RewardResult


class JobCancelled(Exception):
    """The job was cancelled; its remaining requests are not scored."""


class ScoringJob:
    """Requests to score, which may be submitted while the first ones are being scored.

    `submit`, `finish` and `cancel` may be called from any thread. Everything else belongs to the thread that runs the
    job (see `RewardPool.run`).

    Args:
        wake: function that wakes the running thread.

    Attributes:
        requests: drained requests, in the order of `submit`.
        pending: indices of requests that are not assigned to a worker.
        results: results by request index.
        crashed: indices of requests whose worker died once.
        isolated: indices of requests whose batch timed out or crashed. Each of them is scored alone.
        busy_spans: (start, end) of each time a worker was busy, in seconds of `time.monotonic()`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.requests: list[RewardRequest] = []
        self.pending: deque[int] = deque()
        self.results: dict[int, RewardResult] = {}
        self.crashed: set[int] = set()
        self.isolated: set[int] = set()
        self.busy_spans: list[tuple[float, float]] = []
        self._wake = wake
        self._incoming: SimpleQueue[RewardRequest] = SimpleQueue()
        self._complete = threading.Event()
        self._cancelled = threading.Event()

    def submit(self, request: RewardRequest) -> None:
        """Add a request without blocking."""
        self._incoming.put(request)
        self._wake()

    def finish(self) -> None:
        """Declare that no more requests will be submitted."""
        self._complete.set()
        self._wake()

    def cancel(self) -> None:
        """Stop the job; requests without a result are dropped."""
        self._cancelled.set()
        self._wake()

    def drain(self) -> None:
        """Move submitted requests to `requests` and `pending`.

        Raises:
            JobCancelled: the job was cancelled.
        """
        if self._cancelled.is_set():
            raise JobCancelled
        try:
            while True:
                self.requests.append(self._incoming.get_nowait())
                self.pending.append(len(self.requests) - 1)
        except Empty:
            pass

    @property
    def num_unfinished(self) -> int:
        """Number of drained requests without a result."""
        return len(self.requests) - len(self.results)

    @property
    def done(self) -> bool:
        """True if no more requests will be submitted and all have a result."""
        # `_complete` is read first, so that a request submitted just before `finish` is not missed.
        return self._complete.is_set() and self._incoming.empty() and not self.num_unfinished

    def take(self, limit: int) -> list[int]:
        """Remove and return up to `limit` pending indices; an isolated request is returned alone."""
        taken = [self.pending.popleft()]
        while self.pending and len(taken) < limit and not {taken[0], self.pending[0]} & self.isolated:
            taken.append(self.pending.popleft())
        return taken

    def requeue(self, indices: Sequence[int]) -> None:
        """Put indices back at the front of `pending`, in the given order."""
        self.pending.extendleft(reversed(indices))

    def ordered_results(self) -> list[RewardResult]:
        """Return all results in the order of `submit`."""
        return [self.results[index] for index in range(len(self.requests))]
