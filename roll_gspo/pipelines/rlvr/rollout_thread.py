"""The thread that keeps the engines generating while the trainer trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from roll_gspo.errors import WorkerHungError
from roll_gspo.pipelines.rlvr.rollout_stream import RolloutStream

logger = logging.getLogger(__name__)
_SLICE_S = 0.1
_STOP_TIMEOUT_S = 60.0


class RolloutThread:
    """Pump a stream in the background.

    Args:
        stream: the groups in flight.
        timeout_s: time limit of a wait in which no response and no score arrives.
    """

    def __init__(self, stream: RolloutStream, timeout_s: float) -> None:
        self._stream = stream
        self._timeout_s = timeout_s
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it was started before. If it failed, `wait` raises the error."""
        if self._thread.ident is None and not self._stopping.is_set():
            self._thread.start()

    def wait(self, condition: Callable[[], bool], waited_for: str, serve: Callable[[], None]) -> None:
        """Wait until a condition of the stream holds.

        Args:
            condition: called with the lock of the stream held.
            waited_for: description for errors.
            serve: called often without the lock, e.g. to show progress and to restart lost engines.

        Raises:
            WorkerHungError: nothing arrived for `timeout_s`.
            RollGspoError: the thread failed.
        """
        seen, since = self._progress(), time.monotonic()
        while True:
            with self._stream.lock:
                if self._error is not None:
                    raise self._error
                if condition():
                    return
                self._stream.changed.wait(_SLICE_S)
            serve()
            if (now := self._progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout_s:
                raise WorkerHungError(
                    f"actor_infer: no response and no score arrived within {self._timeout_s:g} s while waiting for "
                    f"{waited_for} (worker_timeout_s)"
                )

    def stop(self) -> None:
        """Stop the thread. Further calls do nothing."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("the thread of the rollouts did not stop within %g s", _STOP_TIMEOUT_S)

    def _progress(self) -> tuple[int, int, int]:
        stream = self._stream
        return stream.num_generating, stream.num_scoring, stream.num_taken

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._stream.pump(_SLICE_S)
            except BaseException as error:  # raised by `wait`
                with self._stream.lock:
                    self._error = error
                    self._stream.changed.notify_all()
                return
