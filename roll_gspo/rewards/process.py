"""One worker process as the pool sees it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from roll_gspo.errors import ConfigError, MissingDependencyError, RewardError
from roll_gspo.rewards import pipe
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.catalog import RewardSpec

# A program of its own instead of multiprocessing's spawn: the user's main module is not imported again (it may
# load torch, or lack a __main__ guard), and nothing of the parent's threads, CUDA or engine state is inherited.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from roll_gspo.rewards.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
_IO_TIMEOUT_S = 30.0
_EXIT_TIMEOUT_S = 10.0
_KNOWN_ERRORS = {c.__name__: c for c in (ConfigError, MissingDependencyError)}


class WorkerDiedError(RewardError):
    """A process ended before its reward was built, without a word of why."""


class WorkerProcess:
    """A process that holds one built reward.

    Attributes:
        ready: the reward is built.
        takes_batches: it is a `BatchReward`.
        assigned: indices of the requests it has not answered; it is at work on the first, or on all as one batch.
        busy_since: `time.monotonic()` at which it began with what it is at work on.
        deadline: `time.monotonic()` at which it has been silent for too long.
    """

    def __init__(self, spec: RewardSpec, where: str, start_timeout_s: float, max_memory_mb: int | None = None) -> None:
        self._where = where
        self._name = spec.name
        self._start_timeout_s = start_timeout_s
        self.ready = False
        self.takes_batches = False
        self.busy_since = 0.0
        self.assigned: deque[int] = deque()
        self.deadline = time.monotonic() + start_timeout_s
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(_IO_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(os.getpid()), json.dumps(_search_path())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints must not mix with the run's own output
                start_new_session=True,  # a group that can be killed whole, and out of reach of Ctrl-C
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        try:
            pipe.send(self._connection, pickle.dumps((spec, max_memory_mb)))
        except OSError:
            self.kill()
            raise WorkerDiedError(self._not_started("it died at once")) from None

    def fileno(self) -> int:
        """Readable when `receive` has something; for a selector."""
        return self._connection.fileno()

    @property
    def pid(self) -> int:
        """Also the id of its process group."""
        return self._process.pid

    @property
    def idle(self) -> bool:
        """Ready and without work."""
        return self.ready and not self.assigned

    def assign(self, indices: Sequence[int], requests: Sequence[RewardRequest], timeout_s: float) -> None:
        """Hand over requests; each may take `timeout_s`, a batch as much as its requests together.

        Raises:
            OSError: the process is gone, or did not take them within 30 s.
        """
        self.assigned = deque(indices)
        self._start_clock(timeout_s)
        pipe.send(self._connection, pickle.dumps((timeout_s, list(requests))))

    def receive_ready(self) -> None:
        """Read that the reward is built.

        Raises:
            ConfigError, MissingDependencyError, RewardError: it could not be.
            WorkerDiedError: the process died.
        """
        try:
            answer = self._receive()
        except (EOFError, OSError):
            raise WorkerDiedError(self._not_started(f"it {self.kill()}")) from None
        if "error" in answer:
            kind, text = answer["error"]
            if kind in _KNOWN_ERRORS:
                raise _KNOWN_ERRORS[kind](f"{self._where}: {text}")
            raise RewardError(self._not_started(f"{kind}: {text}"))
        self.takes_batches = answer["batch"]
        self.ready = True

    def receive_result(self, timeout_s: float) -> tuple[int, RewardResult]:
        """Read the answer to the first assigned request, and start the clock of the next.

        Raises:
            EOFError, OSError: the process died.
        """
        result = RewardResult(**self._receive())
        index = self.assigned.popleft()
        self._start_clock(timeout_s)
        return index, result

    def _start_clock(self, timeout_s: float) -> None:
        self.busy_since = time.monotonic()
        self.deadline = self.busy_since + timeout_s * (len(self.assigned) if self.takes_batches else 1)

    def raise_not_ready(self) -> None:
        """Say that the start took too long."""
        raise RewardError(self._not_started(f"not ready after {self._start_timeout_s:g} s"))

    def kill(self) -> str:
        """End the process and what the reward started; says how it ended (its own way, if it was first)."""
        self._connection.close()
        code = self._process.returncode
        if code is None:  # else the group's id may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            try:
                code = self._process.wait(timeout=_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return f"did not end within {_EXIT_TIMEOUT_S:g} s of SIGKILL (pid {self.pid})"
        if code == -signal.SIGKILL:
            return "died (signal 9: killed from outside, by the kernel where memory ran out)"
        return f"died (signal {-code})" if code < 0 else f"died (exit code {code})"

    def _receive(self) -> Any:
        return json.loads(pipe.receive(self._connection))

    def _not_started(self, reason: str) -> str:
        subject = f"{self._where}: reward {self._name}"
        return f"{subject}: its worker process did not start: {reason}; see what it printed above"


def _search_path() -> list[str]:
    """The parent's, with the working directory first, as `python -m` has it."""
    return [os.getcwd(), *(path for path in sys.path if path and path != os.getcwd())]
