"""Handle of one worker process: start, messages, end."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from roll_gspo.errors import ConfigError, MissingDependencyError, RollGspoError
from roll_gspo.workers import pipe
from roll_gspo.workers.output import WorkerOutput

# A separate program instead of multiprocessing's spawn, which would import the user's main module again (that may load
# torch or lack a __main__ guard). The worker inherits no threads, CUDA context or engine state of the parent.
_LAUNCH_CODE = (
    "import json, sys; own, paths = json.loads(sys.argv[3]); sys.path[:] = paths if own else [*paths, *sys.path]; "
    "from {module} import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
_IO_TIMEOUT_S = 30.0
_PACKAGE = Path(__file__).parents[1]
MARK = "ROLL_GSPO_WORKER_POOL"
_EXIT_TIMEOUT_S = 10.0
_KNOWN_ERRORS = {c.__name__: c for c in (ConfigError, MissingDependencyError)}


class WorkerStartError(RollGspoError):
    """A worker process died before it was ready and reported no error."""


@dataclass(frozen=True)
class WorkerProgram:
    """The program of the workers of a pool.

    Attributes:
        module: module whose `main(descriptor, parent_pid)` runs in the process; see `child.serve`.
        setup: first message to the process; it must pickle.
        key: key path of the block in the configuration, for error messages.
        title: what the process holds, for error messages, e.g. `reward math_rule`.
        start_timeout_s: seconds until the process must be ready.
        error: class of the error if the process cannot start.
        python: interpreter of the process; None: the one of this process. Another one imports its packages from its
            installation, and the modules of the working directory and of this package from here.
    """

    module: str
    setup: Any
    key: str
    title: str
    start_timeout_s: float
    error: type[RollGspoError]
    python: str | None = None

    def failed_start(self, reason: str) -> RollGspoError:
        """Return the error of a process that did not start."""
        return self.error(self.failure_text(reason))

    def failure_text(self, reason: str) -> str:
        """Return the message of a process that did not start."""
        return f"{self.key}: the worker process of {self.title} did not start: {reason}; see its output above"


class ChildProcess:
    """A worker process and the connection to it.

    Args:
        program: what the process runs.
        output: forwards the output of the process.
        mark: value of the environment variable `MARK`, by which processes of the pool are found.

    Raises:
        WorkerStartError: the process died at once.
        RollGspoError: the interpreter cannot be executed; of the program's class.

    Attributes:
        ready: True if the process has sent its first message.
        deadline: time at which the worker counts as hung, in seconds of `time.monotonic()`.
    """

    def __init__(self, program: WorkerProgram, output: WorkerOutput, mark: str) -> None:
        self._program = program
        self._output = output
        self.ready = False
        self.deadline = time.monotonic() + program.start_timeout_s
        self._connection, child_end = socket.socketpair()
        self._connection.settimeout(_IO_TIMEOUT_S)
        self._messages = pipe.MessageReader(self._connection)
        reader, writer = os.pipe()
        self._reader: int | None = reader
        try:
            with child_end:
                self._process = self._started(child_end.fileno(), writer, mark)
        except OSError as error:
            self._connection.close()
            os.close(reader)
            reason = f"{program.python or sys.executable} cannot be executed: {error.strerror}"
            raise program.failed_start(reason) from None
        finally:
            os.close(writer)
        output.add(reader, self.pid)
        try:
            self.send(program.setup)
        except OSError:
            self.kill()
            raise WorkerStartError(program.failure_text("it died at once")) from None

    def _started(self, connection: int, output: int, mark: str) -> subprocess.Popen[bytes]:
        program = self._program
        return subprocess.Popen(
            [
                program.python or sys.executable,
                "-c",
                _LAUNCH_CODE.format(module=program.module),
                str(connection),
                str(os.getpid()),
                json.dumps(_sys_path(program.python)),
            ],
            pass_fds=(connection,),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a process group that can be killed as a whole and does not receive Ctrl-C
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
        )

    def fileno(self) -> int:
        """Return the file descriptor that a selector polls for messages."""
        return self._connection.fileno()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            OSError: the process died, or did not read the message within 30 s.
        """
        pipe.send(self._connection, pickle.dumps(message))

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have arrived: JSON values, because the process runs code that is not trusted.

        Raises:
            EOFError, OSError: the process died, or sent no JSON.
        """
        for message in self._messages.read():
            try:
                yield json.loads(message)
            except ValueError:
                raise EOFError("the process sent no JSON") from None

    def receive_start(self) -> Any:
        """Return the first message, or None if only a part of it has arrived.

        Raises:
            ConfigError, MissingDependencyError, RollGspoError: the process reported an error, of the program's class.
            WorkerStartError: the process died.
        """
        try:
            answer = next(self.receive(), None)
        except (EOFError, OSError):
            raise WorkerStartError(self._program.failure_text(f"it {self.kill()}")) from None
        if answer is None:
            return None
        if "error" in answer:
            kind, text = answer["error"]
            if kind in _KNOWN_ERRORS:
                raise _KNOWN_ERRORS[kind](f"{self._program.key}: {text}")
            raise self._program.failed_start(f"{kind}: {text}")
        self.ready = True
        return answer

    def raise_start_timeout(self) -> None:
        """Raise the error for a process that was not ready in time."""
        raise self._program.failed_start(f"not ready after start_timeout_s {self._program.start_timeout_s:g}")

    def kill(self) -> str:
        """Kill the process group, and return how the process ended, e.g. `died (exit code 1)`."""
        self._connection.close()
        code = kill_group(self._process)
        if code is None:
            return f"did not end within {_EXIT_TIMEOUT_S:g} s after SIGKILL (pid {self.pid})"
        if self._reader is not None:
            self._output.remove(self._reader)
            self._reader = None
        if code == -signal.SIGKILL:
            return "died (signal 9: killed from outside, e.g. by the kernel when memory ran out)"
        return f"died (signal {-code})" if code < 0 else f"died (exit code {code})"


def kill_group(process: subprocess.Popen[bytes]) -> int | None:
    """Kill the leader of a process group, the group and all descendants.

    Returns:
        The exit code of the leader, or None if it does not end.
    """
    if process.returncode is None:  # otherwise the group id may have been reused
        descendants = _descendants(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        _kill(descendants)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_EXIT_TIMEOUT_S)
    return process.returncode


def kill_marked(mark: str) -> None:
    """Kill the processes that the workers of a pool started and left behind, e.g. daemons in new sessions."""
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


def _sys_path(python: str | None) -> tuple[bool, list[str]]:
    """Return whether the process has the parent's `sys.path` only, and these paths.

    The working directory comes first, as `python -m` has it. Another interpreter keeps its paths, so it gets none of
    the installation of this one.
    """
    paths = import_path()
    if python is None:
        return True, paths
    standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    paths.append(str(_PACKAGE.parent))
    return False, [
        path
        for path in dict.fromkeys(paths)
        if not {"site-packages", "dist-packages"} & set(Path(path).parts)
        and not any(Path(path).is_relative_to(folder) for folder in standard)
    ]


def import_path() -> list[str]:
    """Return the `sys.path` of this process with the working directory first, as `python -m` has it."""
    return [os.getcwd(), *(path for path in sys.path if path and path != os.getcwd())]
