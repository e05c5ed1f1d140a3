"""Ctrl-C (and SIGTERM) between steps: the step in progress is finished and saved; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupt:
    """Whether the user has asked to stop, and by which signal."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """A signal came; the step in progress is the last."""
        return self.signal is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.requested:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # A signal may come while this very thread is writing to the stream, which then refuses a second writer.
        with suppress(RuntimeError):
            self._notify(f"{self.signal.name}: finishing this step and saving; once more stops at once")


@contextmanager
def graceful_interrupt(notify: Callable[[str], None]) -> Iterator[Interrupt]:
    """Within, SIGINT and SIGTERM are only remembered the first time."""
    interrupt = Interrupt(notify)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, interrupt.handle) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
