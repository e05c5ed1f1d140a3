"""Program of the fork server, from which sandboxed programs are forked.

The fork server is a bare interpreter with common modules loaded, in its own namespaces (see `namespaces`). Starting a
program therefore takes a few forks, without starting an interpreter or building a file system. Each program runs in a
new PID namespace whose first process is a `runner`. When the runner ends, the kernel kills the whole namespace.

The server receives `{"do": "start"}` with one end of a socket for the new runner, and `{"do": "end", "id": n}`. It
answers each command.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
from typing import Any, NoReturn

from roll_gspo.sandbox import messages, namespaces, runner, syscalls
from roll_gspo.sandbox.limits import Limits

_PARENT_CHECK_S = 0.5
_MAX_ORPHAN_ROUNDS = 1000


def main(descriptor: int, parent_pid: int) -> None:
    """Handle commands until the socket is closed or the parent ends.

    Args:
        descriptor: file descriptor of the socket.
        parent_pid: process id of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.umask(0o022)
    control = socket.socket(fileno=descriptor)
    setup, _, _ = messages.receive(control)
    limits, isolated = Limits(**setup["limits"]), bool(setup["isolated"])
    try:
        _prepare(setup, isolated)
    except (OSError, ImportError) as error:
        messages.send(control, {"problem": str(error)})
        return
    syscalls.become_subreaper()
    messages.send(control, {})
    devnull = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(devnull, standard)
    os.close(devnull)
    # Poll `getppid`, because the parent-death signal fires when the *thread* ends that started this process.
    running: dict[int, int] = {}
    while os.getppid() == parent_pid:
        if select.select([control], [], [], _PARENT_CHECK_S)[0]:
            try:
                command, _, descriptors = messages.receive(control, max_descriptors=1)
            except (EOFError, ConnectionError):
                break
            messages.send(control, _handle(command, descriptors, running, limits, isolated))
    for runner_pid, supervisor_pid in running.items():
        _kill_program(runner_pid, supervisor_pid)


def _prepare(setup: dict[str, Any], isolated: bool) -> None:
    """Import the modules that programs use, then enter the namespaces, in which this package cannot be imported."""
    for name in setup["modules"]:
        importlib.import_module(name)
    runner.prepare()
    os.environ.clear()
    os.environ.update(setup["environment"])
    sys.argv[:] = ["solution.py"]
    sys.executable = setup["executable"]
    if isolated:
        namespaces.enter(
            namespaces.VisibleFiles(**{name: _tuples(value) for name, value in setup["visible_files"].items()})
        )
        os.chdir("/tmp")
    sys.path[:] = setup["path"]
    for name in setup["packages"]:
        importlib.import_module(name)
    gc.freeze()  # otherwise the garbage collector copies shared pages in every fork


def _tuples(value: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _handle(
    command: dict[str, Any], descriptors: list[int], running: dict[int, int], limits: Limits, isolated: bool
) -> dict[str, Any]:
    if command["do"] == "end":
        runner_pid = int(command["id"])
        _kill_program(runner_pid, running.pop(runner_pid))
        if not isolated:
            _kill_orphans(running)
        return {}
    (descriptor,) = descriptors
    try:
        runner_pid, supervisor_pid = _start_program(descriptor, limits, isolated, command["folder"])
    except OSError as error:
        return {"problem": str(error)}
    finally:
        os.close(descriptor)
    running[runner_pid] = supervisor_pid
    return {"id": runner_pid}


def _kill_program(runner_pid: int, supervisor_pid: int) -> None:
    """Kill a runner and its PID namespace."""
    os.kill(supervisor_pid, signal.SIGKILL)
    os.waitpid(supervisor_pid, 0)
    # Without its supervisor, the runner is a child of this process, so its id cannot have been reused.
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(runner_pid, os.WNOHANG) == (0, 0):
            os.kill(runner_pid, signal.SIGKILL)
            os.waitpid(runner_pid, 0)


def _kill_orphans(running: dict[int, int]) -> None:
    """Kill processes that programs left behind, which are children of this process by now.

    This is only needed without PID namespaces.
    """
    known = {*running.values()}
    for _ in range(_MAX_ORPHAN_ROUNDS):
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
            orphans = {int(pid) for pid in file.read().split()} - known
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if not orphans:
            return


def _start_program(descriptor: int, limits: Limits, isolated: bool, folder: str | None) -> tuple[int, int]:
    """Fork a supervisor, which forks the runner, and return the process ids (runner, supervisor).

    The supervisor is necessary because a process can unshare the PID namespace of its children only once.
    """
    read_end, write_end = os.pipe()
    supervisor_pid = os.fork()
    if not supervisor_pid:
        _supervise(descriptor, write_end, limits, isolated, folder)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read().decode()
    if not answer.isdigit():
        os.waitpid(supervisor_pid, 0)
        raise OSError(answer or "the supervisor of a sandboxed program died")
    return int(answer), supervisor_pid


def _supervise(descriptor: int, write_end: int, limits: Limits, isolated: bool, folder: str | None) -> NoReturn:
    """Create the namespaces of one program, start its runner, report its process id, and wait for its end."""
    try:
        syscalls.set_parent_death_signal()
        if isolated:
            namespaces.enter_program_namespaces(limits.tmp_mb)
        runner_pid = os.fork()
        if not runner_pid:
            os.close(write_end)
            runner.main(descriptor, limits, isolated, folder)
        os.close(descriptor)
        os.write(write_end, str(runner_pid).encode())
        os.close(write_end)
        os.waitpid(runner_pid, 0)
        os._exit(0)
    except BaseException as error:
        os.write(write_end, str(error).encode() or b"?")
        os._exit(1)
