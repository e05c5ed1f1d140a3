"""One tracker in a separate thread, so that it can neither block nor stop the training."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from roll_gspo.tracking.base import Tracker

logger = logging.getLogger(__name__)

MAX_PENDING_CALLS = 1000

Call = Callable[[Tracker], None]


class BackgroundTracker:
    """Run one tracker in a daemon thread behind a bounded queue.

    A tracker that raises, whose queue is full, or that does not close in time is dropped with one warning. No method
    raises; only `join` blocks, and never longer than its timeout.

    Args:
        name: value of `track_with`.
        start: builds the tracker; called in the thread.
        max_pending: calls that may wait.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], max_pending: int = MAX_PENDING_CALLS) -> None:
        self._name = name
        self._start = start
        self._calls: queue.Queue[tuple[str, Call] | None] = queue.Queue(max_pending)
        self._lock = threading.Lock()
        self._dropped = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def submit(self, what: str, call: Call) -> None:
        """Queue a call of the tracker; `what` names it in a warning."""
        if self._dropped or self._stopped:
            return
        try:
            self._calls.put_nowait((what, call))
        except queue.Full:
            self._drop(what, f"{self._calls.maxsize} earlier calls are still pending")

    def stop(self) -> None:
        """Close the tracker after the calls that are queued. A second call does nothing."""
        if self._dropped or self._stopped:
            return
        self._stopped = True
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            self._drop("close", f"{self._calls.maxsize} earlier calls are still pending")

    def join(self, timeout_s: float) -> None:
        """Wait until the tracker is closed, at most `timeout_s` seconds."""
        if self._dropped:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._drop("close", f"not finished after {timeout_s:.3g} s")

    def _run(self) -> None:
        what, tracker = "start", None
        try:
            tracker = self._start()
            while (item := self._calls.get()) is not None and not self._dropped:
                what, call = item
                call(tracker)
            what, closing, tracker = "close", tracker, None
            closing.close()
        except Exception as error:
            self._drop(what, f"{type(error).__name__}: {error}")
        if tracker is not None:
            self._close_after_error(tracker)

    def _close_after_error(self, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:
            logger.debug("%s: closing it after an error: %s", self._name, error)

    def _drop(self, what: str, reason: str) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, True
        if not dropped:
            logger.warning("track_with: %s is dropped for the rest of the run: %s: %s", self._name, what, reason)
