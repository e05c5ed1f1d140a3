"""Handling of Ctrl-C and SIGTERM: finish and save the current step. A second signal stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupt:
    """Record of the signal by which the user asked to stop."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True after a signal: the current step is the last."""
        return self.signal is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal; raise KeyboardInterrupt on the second."""
        if self.requested:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # A signal may arrive while this thread writes to the stream. A reentrant write raises RuntimeError.
        with suppress(RuntimeError):
            self._notify(f"{self.signal.name}: finishing this step and saving; once more stops at once")


@contextmanager
def graceful_interrupt(notify: Callable[[str], None]) -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM inside the context instead of stopping."""
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
