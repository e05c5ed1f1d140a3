"""What a pool is asked in one go, and what it has answered so far."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from roll_gspo.rewards.base import RewardRequest, RewardResult


class RoundCancelled(Exception):
    """Nobody wants the results any more."""


class Round:
    """Requests that may still be coming in while the first are scored; `submit`, `finish`, `cancel` from any thread.

    All else belongs to the thread that works it off.

    Args:
        wake: tells that thread to look here again.

    Attributes:
        requests: those that it has seen, in the order of `submit`.
        pending: indices that no worker has.
        results: by index.
        lost: samples at which a worker died once.
        alone: samples of a batch that hung or died, each to be scored by itself.
        spans: (begin, end) of each piece of work, `time.monotonic()`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.requests: list[RewardRequest] = []
        self.pending: deque[int] = deque()
        self.results: dict[int, RewardResult] = {}
        self.lost: set[int] = set()
        self.alone: set[int] = set()
        self.spans: list[tuple[float, float]] = []
        self._wake = wake
        self._incoming: SimpleQueue[RewardRequest] = SimpleQueue()
        self._complete = threading.Event()
        self._cancelled = threading.Event()

    def submit(self, request: RewardRequest) -> None:
        """Add a request; returns at once."""
        self._incoming.put(request)
        self._wake()

    def finish(self) -> None:
        """No more will come."""
        self._complete.set()
        self._wake()

    def cancel(self) -> None:
        """Give up what is not scored yet."""
        self._cancelled.set()
        self._wake()

    def drain(self) -> None:
        """Look for new requests.

        Raises:
            RoundCancelled: it was.
        """
        if self._cancelled.is_set():
            raise RoundCancelled
        try:
            while True:
                self.requests.append(self._incoming.get_nowait())
                self.pending.append(len(self.requests) - 1)
        except Empty:
            pass

    @property
    def num_open(self) -> int:
        """Requests without a result."""
        return len(self.requests) - len(self.results)

    @property
    def finished(self) -> bool:
        """All that will ever come has a result."""
        # In this order: what came before `finish` is then not overlooked.
        return self._complete.is_set() and self._incoming.empty() and not self.num_open

    def take(self, limit: int) -> list[int]:
        """Indices of the next pending requests, `limit` at most and one of those that go alone."""
        taken = [self.pending.popleft()]
        while self.pending and len(taken) < limit and not {taken[0], self.pending[0]} & self.alone:
            taken.append(self.pending.popleft())
        return taken

    def requeue(self, indices: Sequence[int]) -> None:
        """They are the next to be scored, in this order."""
        self.pending.extendleft(reversed(indices))

    def ordered_results(self) -> list[RewardResult]:
        """All of them, in the order of `submit`."""
        return [self.results[index] for index in range(len(self.requests))]
