"""Output of worker processes: forwarded up to a limit, then dropped and counted."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from dataclasses import dataclass

from roll_gspo.printable import printable

MAX_WORKER_BYTES = 16 * 1024
MAX_STEP_BYTES = 64 * 1024
_CHUNK = 1 << 16


@dataclass
class _Stream:
    """The output of one process."""

    pid: int
    forwarded: int = 0
    dropped: int = 0


class WorkerOutput:
    """Read the output of worker processes in a thread, so that a process that prints never waits.

    Args:
        key: key path of the block in the configuration, for the line that reports what was dropped.
        descriptor: where the output goes.
        max_worker_bytes, max_step_bytes: limits of one process and of all processes between two calls of `next_step`.
    """

    def __init__(
        self,
        key: str,
        descriptor: int = 2,
        max_worker_bytes: int = MAX_WORKER_BYTES,
        max_step_bytes: int = MAX_STEP_BYTES,
    ) -> None:
        self._key = key
        self._descriptor = descriptor
        self._max_worker_bytes = max_worker_bytes
        self._max_step_bytes = max_step_bytes
        self._forwarded = 0
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = os.pipe()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, reader: int, pid: int) -> None:
        """Forward what process `pid` writes; `reader` is the end of its pipe, which this object closes."""
        os.set_blocking(reader, False)
        with self._lock:
            self._streams[reader] = _Stream(pid)
            self._selector.register(reader, selectors.EVENT_READ, self._streams[reader])
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"output of {self._key}", daemon=True)
                self._thread.start()
        self._wake()

    def remove(self, reader: int) -> None:
        """Forward what is left of a process that ended, then close the pipe. A process that still has it gets EPIPE."""
        with self._lock:
            stream = self._streams.pop(reader)
            if reader in self._selector.get_map():
                self._forward(reader, stream)
                self._selector.unregister(reader)
            self._report(stream)
            os.close(reader)

    def next_step(self) -> None:
        """Report what was dropped, and start counting anew."""
        with self._lock:
            for stream in self._streams.values():
                self._report(stream)
                stream.forwarded = 0
            self._forwarded = 0

    def close(self) -> None:
        """Report what was dropped and stop reading."""
        self.next_step()
        self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
        for reader in list(self._streams):
            self.remove(reader)
        self._selector.close()
        os.close(self._wake_receiver)
        os.close(self._wake_sender)

    def _wake(self) -> None:
        os.write(self._wake_sender, b"!")

    def _run(self) -> None:
        while not self._closing:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    if key.data is None:
                        os.read(self._wake_receiver, 4096)
                    elif key.fd in self._selector.get_map() and not self._forward(key.fd, key.data):
                        self._selector.unregister(key.fd)

    def _forward(self, reader: int, stream: _Stream) -> bool:
        """Read what is there; return False at the end of the output."""
        for _ in range(16):  # a process that prints without end must not hold the lock
            try:
                data = os.read(reader, _CHUNK)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            left = min(self._max_worker_bytes - stream.forwarded, self._max_step_bytes - self._forwarded)
            kept = data[: max(left, 0)]
            stream.forwarded += len(kept)
            self._forwarded += len(kept)
            stream.dropped += len(data) - len(kept)
            self._write(kept.decode("utf-8", "backslashreplace"))
        return True

    def _report(self, stream: _Stream) -> None:
        if stream.dropped:
            self._write(
                f"\n{self._key}: {stream.dropped:,} bytes of output of worker {stream.pid} were dropped (it may print "
                f"{self._max_worker_bytes:,} bytes per step, all workers {self._max_step_bytes:,}); print less\n"
            )
            stream.dropped = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads the output of the run any more
            os.write(self._descriptor, printable(text).encode())
