"""Handle of one worker process, used by the pool."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from roll_gspo.errors import ConfigError, MissingDependencyError, RewardError
from roll_gspo.rewards import pipe
from roll_gspo.rewards.base import RewardResult
from roll_gspo.rewards.job import Sample
from roll_gspo.rewards.output import WorkerOutput
from roll_gspo.rewards.spec import RewardSpec

# A separate program instead of multiprocessing's spawn, which would import the user's main module again (that may load
# torch or lack a __main__ guard). The worker inherits no threads, CUDA context or engine state of the parent.
_LAUNCH_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from roll_gspo.rewards.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
_IO_TIMEOUT_S = 30.0
MARK = "ROLL_GSPO_REWARD_POOL"
_EXIT_TIMEOUT_S = 10.0
_KNOWN_ERRORS = {c.__name__: c for c in (ConfigError, MissingDependencyError)}


class WorkerStartError(RewardError):
    """A worker process died before its reward was built and reported no error."""


class WorkerProcess:
    """A process that holds one built reward.

    Args:
        spec: spec of the reward.
        key: key path of the reward's block, for error messages.
        start_timeout_s: seconds until the reward must be built.
        max_memory_mb: MiB that the process may allocate; None for no limit.
        output: forwards the output of the process.
        mark: value of the environment variable `MARK`, by which processes of the reward are found.

    Attributes:
        ready: True if the reward is built.
        scores_batches: True if the reward is a `BatchReward`.
        assigned: unanswered samples, all of one job. The worker scores the first one, or all of them as a batch.
        busy_since: start of the current work, in seconds of `time.monotonic()`.
        deadline: time at which the worker counts as hung, in seconds of `time.monotonic()`.
    """

    def __init__(
        self,
        spec: RewardSpec,
        key: str,
        start_timeout_s: float,
        max_memory_mb: int | None,
        output: WorkerOutput,
        mark: str,
    ) -> None:
        self._key = key
        self._output = output
        self._name = spec.name
        self._start_timeout_s = start_timeout_s
        self.ready = False
        self.scores_batches = False
        self.busy_since = 0.0
        self.assigned: deque[Sample] = deque()
        self.deadline = time.monotonic() + start_timeout_s
        self._connection, child_end = socket.socketpair()
        self._connection.settimeout(_IO_TIMEOUT_S)
        self._messages = pipe.MessageReader(self._connection)
        reader, writer = os.pipe()
        self._reader: int | None = reader
        with child_end:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _LAUNCH_CODE,
                    str(child_end.fileno()),
                    str(os.getpid()),
                    json.dumps(_sys_path()),
                ],
                pass_fds=(child_end.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                start_new_session=True,  # a process group that can be killed as a whole and does not receive Ctrl-C
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
            )
        os.close(writer)
        output.add(reader, self.pid)
        try:
            pipe.send(self._connection, pickle.dumps((spec, max_memory_mb)))
        except OSError:
            self.kill()
            raise WorkerStartError(self._start_failure("it died at once")) from None

    def fileno(self) -> int:
        """Return the file descriptor that a selector polls for messages."""
        return self._connection.fileno()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    @property
    def idle(self) -> bool:
        """True if the worker is ready and has no requests."""
        return self.ready and not self.assigned

    def assign(self, samples: Sequence[Sample], timeout_s: float) -> None:
        """Send requests to the worker.

        Args:
            samples: samples of one job.
            timeout_s: seconds per sample; a batch of n samples has n times as long.

        Raises:
            OSError: the process died, or did not read the requests within 30 s.
        """
        self.assigned = deque(samples)
        self._start_clock(timeout_s)
        pipe.send(self._connection, pickle.dumps((timeout_s, [sample.request for sample in samples])))

    def receive_ready(self) -> None:
        """Receive the message that the reward is built. Does nothing if only a part of it has arrived.

        Raises:
            ConfigError, MissingDependencyError, RewardError: the reward cannot be built.
            WorkerStartError: the process died.
        """
        try:
            answer = next(self._receive(), None)
        except (EOFError, OSError):
            raise WorkerStartError(self._start_failure(f"it {self.kill()}")) from None
        if answer is None:
            return
        if "error" in answer:
            kind, text = answer["error"]
            if kind in _KNOWN_ERRORS:
                raise _KNOWN_ERRORS[kind](f"{self._key}: {text}")
            raise RewardError(self._start_failure(f"{kind}: {text}"))
        self.scores_batches = answer["batch"]
        self.ready = True

    def receive_results(self, timeout_s: float) -> Iterator[tuple[Sample, RewardResult]]:
        """Yield the samples and results that have arrived, in the order of the requests. Each restarts the clock.

        Raises:
            EOFError, OSError: the process died, or sent something else.
        """
        for answer in self._receive():
            try:
                result, sample = RewardResult(**answer), self.assigned.popleft()
            except (TypeError, IndexError):
                raise EOFError("the process sent no result") from None
            self._start_clock(timeout_s)
            yield sample, result

    def _start_clock(self, timeout_s: float) -> None:
        self.busy_since = time.monotonic()
        self.deadline = self.busy_since + timeout_s * (len(self.assigned) if self.scores_batches else 1)

    def raise_start_timeout(self) -> None:
        """Raise the error for a reward that was not built in time."""
        raise RewardError(self._start_failure(f"not ready after start_timeout_s {self._start_timeout_s:g}"))

    def kill(self) -> str:
        """Kill the process group, and return how the process ended, e.g. `died (exit code 1)`."""
        self._connection.close()
        code = self._process.returncode
        if code is None:  # otherwise the group id may have been reused
            descendants = _descendants(self.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            _kill(descendants)
            try:
                code = self._process.wait(timeout=_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return f"did not end within {_EXIT_TIMEOUT_S:g} s after SIGKILL (pid {self.pid})"
        if self._reader is not None:
            self._output.remove(self._reader)
            self._reader = None
        if code == -signal.SIGKILL:
            return "died (signal 9: killed from outside, e.g. by the kernel when memory ran out)"
        return f"died (signal {-code})" if code < 0 else f"died (exit code {code})"

    def _receive(self) -> Iterator[Any]:
        for message in self._messages.read():
            try:
                yield json.loads(message)
            except ValueError:
                raise EOFError("the process sent no JSON") from None

    def _start_failure(self, reason: str) -> str:
        return f"{self._key}: the worker process of reward {self._name} did not start: {reason}; see its output above"


def kill_marked(mark: str) -> None:
    """Kill the processes that a reward started and left behind, e.g. daemons in new sessions."""
    entry = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _sys_path() -> list[str]:
    """Return the parent's `sys.path` with the working directory first, as `python -m` has it."""
    return [os.getcwd(), *(path for path in sys.path if path and path != os.getcwd())]
