"""A lock that waiting threads get in the order of their calls."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from roll_gspo.errors import WorkerHungError


class _Turn:
    """A thread that waits for the lock."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.came = threading.Event()


class FairLock:
    """A re-entrant lock with a queue.

    A thread that polls in a loop releases the lock and asks for it again at once. It then waits behind all others.

    Args:
        name: what the lock protects, for the message of a timeout.
        timeout_s: time limit of `held`.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._queue: deque[_Turn] = deque()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def acquire(self, timeout_s: float) -> bool:
        """Take the lock; return False if it was not free within `timeout_s`."""
        turn = _Turn()
        with self._mutex:
            if self._owner is turn.thread or (self._owner is None and not self._queue):
                self._owner = turn.thread
                self._depth += 1
                return True
            self._queue.append(turn)
        try:
            if turn.came.wait(timeout_s):
                return True
        except BaseException:  # a turn left in the queue would get the lock and never release it
            if self._leave(turn):
                self.release()
            raise
        return self._leave(turn)

    def release(self) -> None:
        """Give the lock to the thread that has waited longest."""
        with self._mutex:
            self._depth -= 1
            if not self._depth:
                self._pass_on()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in the block.

        Raises:
            WorkerHungError: another thread held it for `timeout_s`.
        """
        if not self.acquire(self._timeout_s):
            holder = self._owner.name if self._owner else "nobody"
            raise WorkerHungError(
                f"{self._name}: waited {self._timeout_s:g} s for the engines, which the thread '{holder}' uses; look "
                "for its last message in run.log"
            )
        try:
            yield
        finally:
            self.release()

    def _leave(self, turn: _Turn) -> bool:
        """Leave the queue; return True if the lock was handed over at the last moment."""
        with self._mutex:
            if turn.came.is_set():
                return True
            self._queue.remove(turn)
            return False

    def _pass_on(self) -> None:
        self._owner = None
        if self._queue:
            turn = self._queue.popleft()
            self._owner, self._depth = turn.thread, 1
            turn.came.set()
