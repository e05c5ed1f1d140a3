"""First process of a program's PID namespace: it drops its privileges, compiles the program and runs its cases.

Each case runs in a fork, so that cases share no state and a crash fails one case only. The runner is untrusted: it
never has an expected output, and its messages are treated as data. `Sandbox` measures the time, too.

The runner receives `load` with the source code, then one message per case. It sends one message in answer to each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NoReturn

from roll_gspo.sandbox import folders, messages, namespaces, run_case, seccomp, syscalls
from roll_gspo.sandbox.limits import Limits

_STACK_BYTES = 64 << 20
_MAX_STDERR = 4096
_CHUNK = 1 << 16
_RESERVED_TASKS = 8  # supervisors and runners, which may belong to the same user


def prepare() -> None:
    """Prepare the names of all programs, once in the fork server."""
    run_case.prepare()


def main(descriptor: int, limits: Limits, isolated: bool, folder: str | None) -> NoReturn:
    """Run cases until the socket is closed.

    Args:
        descriptor: file descriptor of the socket to `Sandbox`.
        limits: resource limits of the program.
        isolated: False if the host has no namespaces.
        folder: working directory without isolation.
    """
    try:
        _confine(descriptor, limits, isolated, folder)
        _serve(socket.socket(fileno=descriptor), limits, isolated)
    except (EOFError, ConnectionError):
        pass
    finally:
        os._exit(1)


def _confine(descriptor: int, limits: Limits, isolated: bool, folder: str | None) -> None:
    address_space = _address_space()  # reads the /proc of the host; the sandbox may have none
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1024)
    if isolated:
        namespaces.mount_own_proc()
        namespaces.drop_privileges()
        os.chdir("/tmp")
        syscalls.install_seccomp_filter(seccomp.build_filter(is_runner=True))
    else:
        os.chdir(folder or "/")
        with contextlib.suppress(OSError):  # seccomp requires it; both may be unavailable
            syscalls.set_no_new_privs()
    syscalls.set_parent_death_signal()
    _limit(limits, address_space)
    signal.signal(signal.SIGCHLD, lambda *_: None)


def _address_space() -> int:
    """Return the number of bytes that the bare interpreter has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit(limits: Limits, address_space: int) -> None:
    mebibyte = 1 << 20
    bounds = {
        resource.RLIMIT_AS: address_space + limits.memory_mb * mebibyte,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_FSIZE: limits.file_mb * mebibyte,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in bounds.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _serve(connection: socket.socket, limits: Limits, isolated: bool) -> None:
    code: CodeType | None = None
    while True:
        header, body, descriptors = messages.receive(connection, max_descriptors=1)
        if header["do"] == "load":
            code, problem = _compile(body)
            messages.send(connection, {"problem": problem})
            continue
        case = _Case(header, body, limits, float(header["wall_s"]), isolated)

        def run(header=header, body=body, code=code, descriptors=descriptors) -> NoReturn:
            connection.close()
            run_case.run_case(header, body, code, descriptors[0] if descriptors else None)

        status, exit_code, stdout, stderr = case.run(run)
        for descriptor in descriptors:
            os.close(descriptor)
        del stdout[limits.output_kb << 10 :]
        answer = {"status": status, "exit_code": exit_code, "stdout": len(stdout)}
        messages.send(connection, answer, bytes(stdout + stderr))


def _compile(source: bytes) -> tuple[CodeType | None, str]:
    try:
        return compile(source, "solution.py", "exec", dont_inherit=True), ""
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        return None, f"{type(error).__name__}: {error}"


@dataclass
class _Case:
    """One run of the program in a fork, connected by pipes."""

    header: dict[str, Any]
    body: bytes
    limits: Limits
    wall_s: float
    isolated: bool
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    stderr_bytes: int = 0

    def run(self, child: Callable[[], NoReturn]) -> tuple[str, int, bytearray, bytearray]:
        """Run the case, and return (status, exit code, stdout, stderr). The exit code is -n for signal n."""
        has_stdin = self.header["do"] == "stdin"
        pipes = [os.pipe() for _ in range(4)]  # stdin, stdout, stderr, SIGCHLD
        for end in pipes[3]:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(pipes[3][1], warn_on_full_buffer=False)  # before the fork, so that no SIGCHLD is missed
        pid = os.fork()
        if not pid:
            _start_child(pipes, self.limits, self.isolated, child)
        parent_ends = (pipes[0][1], pipes[1][0], pipes[2][0])
        for child_end in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(child_end)
        for descriptor in parent_ends:
            os.set_blocking(descriptor, False)
        try:
            status, code = self._watch(pid, *parent_ends, pipes[3][0], memoryview(self.body if has_stdin else b""))
        finally:
            signal.set_wakeup_fd(-1)
            for descriptor in (*parent_ends[1:], *pipes[3]):
                os.close(descriptor)
        self._clean()
        return status, code, self.stdout, self.stderr

    def _watch(self, pid: int, stdin: int, stdout: int, stderr: int, wake: int, left: memoryview) -> tuple[str, int]:
        """Write stdin and read the output until the program ends or exceeds a limit; return (status, exit code)."""
        poll = select.poll()
        poll.register(stdin, select.POLLOUT)
        for descriptor in (stdout, stderr, wake):
            poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + self.wall_s
        sinks, stdin_closed, status = {stdout: self.stdout, stderr: self.stderr}, False, ""
        ended = None
        while ended is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or status:
                status = status or "timeout"
                break
            for descriptor, _ in poll.poll(remaining * 1000 + 1):
                if descriptor == stdin:
                    left = _write_some(stdin, left)
                    if not left:
                        poll.unregister(stdin)
                        os.close(stdin)
                        stdin_closed = True
                elif descriptor == wake:
                    os.read(wake, _CHUNK)
                    ended = self._reap(pid)
                elif not self._read(descriptor, sinks[descriptor]):
                    poll.unregister(descriptor)
            if self._output_exceeded():
                status = "output"
        if not stdin_closed:
            os.close(stdin)
        self._kill_all(pid)
        if ended is None:
            ended = self._reap(pid, wait=True)
        for descriptor, sink in sinks.items():
            while self._read(descriptor, sink) and not self._output_exceeded():
                pass
        return self._classify(status or ("output" if self._output_exceeded() else ""), ended)

    def _classify(self, status: str, ended: tuple[int, float] | None) -> tuple[str, int]:
        code, seconds = ended or (-signal.SIGKILL, 0.0)
        killed_for_time = code in (-signal.SIGXCPU, -signal.SIGKILL) and seconds >= self.limits.cpu_s * 0.9
        return status or ("timeout" if killed_for_time else "finished"), code

    def _read(self, descriptor: int, sink: bytearray) -> bool:
        """Read a chunk, and return whether there may be more data."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        sink += data
        if sink is self.stderr:
            self.stderr_bytes += len(data)
            del sink[:-_MAX_STDERR]
        return bool(data)

    def _output_exceeded(self) -> bool:
        return max(len(self.stdout), self.stderr_bytes) > self.limits.output_kb << 10

    def _reap(self, pid: int, wait: bool = False) -> tuple[int, float] | None:
        """Reap ended children, and return (exit code, CPU seconds) of the program if it has ended."""
        while True:
            try:
                number, status, usage = os.wait4(pid if wait else -1, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                return None
            if number == pid:
                return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
            if not number:
                return None

    def _kill_all(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.isolated:
                os.kill(-1, signal.SIGKILL)  # all processes of the namespace except this one
            else:
                os.killpg(pid, signal.SIGKILL)

    def _clean(self) -> None:
        """Reap all children, and empty the working directory for the next case."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if self.isolated else os.WNOHANG)[0]:
                pass
        folders.empty_folder(".")


def _write_some(descriptor: int, left: memoryview) -> memoryview:
    """Write as much as fits without blocking, and return the rest."""
    try:
        return left[os.write(descriptor, left[:_CHUNK]) :] if left else left
    except BlockingIOError:
        return left
    except BrokenPipeError:
        return left[:0]


def _start_child(
    pipes: list[tuple[int, int]], limits: Limits, isolated: bool, child: Callable[[], NoReturn]
) -> NoReturn:
    """Connect the pipes in the fork, apply the remaining limits, and run the case."""
    try:
        os.setsid()
        syscalls.set_parent_death_signal()
        for standard, descriptor in enumerate((pipes[0][0], pipes[1][1], pipes[2][1])):
            os.dup2(descriptor, standard)
        for pair in pipes:
            for descriptor in pair:
                os.close(descriptor)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seconds = int(limits.cpu_s) + (limits.cpu_s % 1 > 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        tasks = limits.threads + limits.processes + _RESERVED_TASKS
        if isolated:  # without a user namespace, the limit counts all processes of the user
            resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))
        try:
            syscalls.install_seccomp_filter(
                seccomp.build_filter(forks=limits.processes > 1, signals_to_others=isolated)
            )
        except (OSError, KeyError):
            if isolated:
                raise
        child()
    finally:
        os._exit(1)
