"""The first process of a program's namespace: it gives up every right, loads the program and runs it, case by case.

Each case is a fork, so that cases know nothing of each other and a crash costs one. This process is not trusted with
anything: it knows no expected output, and what it says is data. `Sandbox` outside keeps the clock as well.

In come `load` with the source, then a message for each case; out goes a message for each.
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

from roll_gspo.sandbox import frames, kernel, program, room, seccomp
from roll_gspo.sandbox.limits import Limits

_STACK_BYTES = 64 << 20
_MAX_STDERR = 4096
_CHUNK = 1 << 16
_OWN_TASKS = 8  # guards and runners, where they are of the same user


def prepare() -> None:
    """In the zygote: what every program has, made once."""
    program.prepare()


def main(descriptor: int, limits: Limits, isolated: bool, folder: str | None) -> NoReturn:
    """Serve until the other end of the socket is closed."""
    try:
        _settle(descriptor, limits, isolated, folder)
        _serve(socket.socket(fileno=descriptor), limits, isolated)
    except (EOFError, ConnectionError):
        pass
    finally:
        os._exit(1)


def _settle(descriptor: int, limits: Limits, isolated: bool, folder: str | None) -> None:
    address_space = _address_space()  # by the host's /proc; there may be no other
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1024)
    if isolated:
        room.show_own_processes()
        room.give_up_privileges()
        os.chdir("/tmp")
        kernel.set_filter(seccomp.refusing())
    else:
        os.chdir(folder or "/")
        with contextlib.suppress(OSError):  # seccomp below may want it, and may be missing as well
            kernel.no_new_privileges()
    kernel.die_with_parent()
    _limit(limits, address_space)
    signal.signal(signal.SIGCHLD, lambda *_: None)


def _address_space() -> int:
    """Bytes that the bare interpreter has mapped."""
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
        header, body, descriptors = frames.receive(connection, max_descriptors=1)
        if header["do"] == "load":
            code, problem = _compile(body)
            frames.send(connection, {"problem": problem})
            continue
        case = _Case(header, body, limits, float(header["wall_s"]), isolated)

        def run(header=header, body=body, code=code, descriptors=descriptors) -> NoReturn:
            connection.close()
            program.run(header, body, code, descriptors[0] if descriptors else None)

        status, exit_code, stdout, stderr = case.run(run)
        for descriptor in descriptors:
            os.close(descriptor)
        del stdout[limits.output_kb << 10 :]
        answer = {"status": status, "exit_code": exit_code, "stdout": len(stdout)}
        frames.send(connection, answer, bytes(stdout + stderr))


def _compile(source: bytes) -> tuple[CodeType | None, str]:
    try:
        return compile(source, "solution.py", "exec", dont_inherit=True), ""
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        return None, f"{type(error).__name__}: {error}"


@dataclass
class _Case:
    """One run of the program in a fork, fed and read through pipes."""

    header: dict[str, Any]
    body: bytes
    limits: Limits
    wall_s: float
    isolated: bool
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    stderr_bytes: int = 0

    def run(self, child: Callable[[], NoReturn]) -> tuple[str, int, bytearray, bytearray]:
        """Status, exit code (-n: signal n), what it printed."""
        feeds = self.header["do"] == "stdin"
        pipes = [os.pipe() for _ in range(4)]  # stdin, stdout, stderr, SIGCHLD
        for end in pipes[3]:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(pipes[3][1], warn_on_full_buffer=False)  # before there is a child that could end
        pid = os.fork()
        if not pid:
            _become_program(pipes, self.limits, self.isolated, child)
        ours = (pipes[0][1], pipes[1][0], pipes[2][0])
        for theirs in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(theirs)
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        try:
            status, code = self._watch(pid, *ours, pipes[3][0], memoryview(self.body if feeds else b""))
        finally:
            signal.set_wakeup_fd(-1)
            for descriptor in (*ours[1:], *pipes[3]):
                os.close(descriptor)
        self._clean()
        return status, code, self.stdout, self.stderr

    def _watch(self, pid: int, into: int, out: int, err: int, wake: int, left: memoryview) -> tuple[str, int]:
        poll = select.poll()
        poll.register(into, select.POLLOUT)
        for descriptor in (out, err, wake):
            poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + self.wall_s
        sinks, fed, status = {out: self.stdout, err: self.stderr}, False, ""
        ended = None
        while ended is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or status:
                status = status or "timeout"
                break
            for descriptor, _ in poll.poll(remaining * 1000 + 1):
                if descriptor == into:
                    left = _feed(into, left)
                    if not left:
                        poll.unregister(into)
                        os.close(into)
                        fed = True
                elif descriptor == wake:
                    os.read(wake, _CHUNK)
                    ended = self._reap(pid)
                elif not self._read(descriptor, sinks[descriptor]):
                    poll.unregister(descriptor)
            if self._too_much():
                status = "output"
        if not fed:
            os.close(into)
        self._end_all(pid)
        if ended is None:
            ended = self._reap(pid, wait=True)
        for descriptor, sink in sinks.items():
            while self._read(descriptor, sink) and not self._too_much():
                pass
        return self._judged(status or ("output" if self._too_much() else ""), ended)

    def _judged(self, status: str, ended: tuple[int, float] | None) -> tuple[str, int]:
        code, seconds = ended or (-signal.SIGKILL, 0.0)
        killed_for_time = code in (-signal.SIGXCPU, -signal.SIGKILL) and seconds >= self.limits.cpu_s * 0.9
        return status or ("timeout" if killed_for_time else "finished"), code

    def _read(self, descriptor: int, sink: bytearray) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        sink += data
        if sink is self.stderr:
            self.stderr_bytes += len(data)
            del sink[:-_MAX_STDERR]
        return bool(data)

    def _too_much(self) -> bool:
        return max(len(self.stdout), self.stderr_bytes) > self.limits.output_kb << 10

    def _reap(self, pid: int, wait: bool = False) -> tuple[int, float] | None:
        """Exit code and processor seconds of the program, once it ended; buries others on the way."""
        while True:
            try:
                number, status, usage = os.wait4(pid if wait else -1, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                return None
            if number == pid:
                return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
            if not number:
                return None

    def _end_all(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.isolated:
                os.kill(-1, signal.SIGKILL)  # all of the namespace but its first process, which is this
            else:
                os.killpg(pid, signal.SIGKILL)

    def _clean(self) -> None:
        """Bury the rest, and leave the next case an empty folder."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if self.isolated else os.WNOHANG)[0]:
                pass
        program.empty_folder(".")


def _feed(descriptor: int, left: memoryview) -> memoryview:
    """Write what fits; what is left."""
    try:
        return left[os.write(descriptor, left[:_CHUNK]) :] if left else left
    except BlockingIOError:
        return left
    except BrokenPipeError:
        return left[:0]


def _become_program(
    pipes: list[tuple[int, int]], limits: Limits, isolated: bool, child: Callable[[], NoReturn]
) -> NoReturn:
    """In the fork: take the pipes and the last limits, and run."""
    try:
        os.setsid()
        kernel.die_with_parent()
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
        tasks = limits.threads + limits.processes + _OWN_TASKS
        if isolated:  # else it would count all that the user runs
            resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))
        try:
            kernel.set_filter(seccomp.refusing(forks=limits.processes > 1, signals_to_others=isolated))
        except (OSError, KeyError):
            if isolated:
                raise
        child()
    finally:
        os._exit(1)
