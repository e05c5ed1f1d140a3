from __future__ import annotations

import os
import signal
import threading

import pytest

from roll_gspo.pipelines.interrupt import graceful_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered_and_the_second_stops_at_once(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with graceful_interrupt(said.append) as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested and interrupt.signal == number
        assert said == [f"{number.name}: finishing this step and saving; once more stops at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_signal_in_the_middle_of_a_write_is_remembered_all_the_same() -> None:
    def busy(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with graceful_interrupt(busy) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested


def test_other_threads_leave_signals_alone() -> None:
    handlers: list[object] = []

    def run() -> None:
        with graceful_interrupt(print):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
