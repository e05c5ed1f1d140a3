"""The process that sandboxed programs are forked from: `main` is its whole life.

A bare interpreter with the usual modules loaded, in a room of its own (see `room`), so that a program costs forks and
neither the start of an interpreter nor the making of a file system. Every program gets a process namespace, whose first
process is a `runner`; when that one ends, the kernel ends the whole namespace.

In come `{"do": "start"}` with one end of a socket for the new runner, and `{"do": "end", "id": n}`; each is answered.
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

from roll_gspo.sandbox import frames, kernel, room, runner
from roll_gspo.sandbox.limits import Limits

_PARENT_CHECK_S = 0.5
_STRAY_ROUNDS = 1000


def main(descriptor: int, parent_pid: int) -> None:
    """Serve until the other end of the socket is closed or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.umask(0o022)
    control = socket.socket(fileno=descriptor)
    setup, _, _ = frames.receive(control)
    limits, isolated = Limits(**setup["limits"]), bool(setup["isolated"])
    try:
        _prepare(setup, isolated)
    except (OSError, ImportError) as error:
        frames.send(control, {"problem": str(error)})
        return
    kernel.adopt_orphans()
    frames.send(control, {})
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    # Guarded by `getppid`, not by a parent-death signal, which fires when the *thread* ends that started this process.
    running: dict[int, int] = {}
    while os.getppid() == parent_pid:
        if select.select([control], [], [], _PARENT_CHECK_S)[0]:
            try:
                command, _, descriptors = frames.receive(control, max_descriptors=1)
            except (EOFError, ConnectionError):
                break
            frames.send(control, _obey(command, descriptors, running, limits, isolated))
    for first, guard in running.items():
        _end(first, guard)


def _prepare(setup: dict[str, Any], isolated: bool) -> None:
    """Load what programs use, then enter the room, where no module of this package can be found any more."""
    for name in setup["modules"]:
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(setup["environment"])
    sys.argv[:] = ["solution.py"]
    sys.executable = setup["executable"]
    if isolated:
        room.enter(room.Contents(**{name: _tuples(value) for name, value in setup["contents"].items()}))
        os.chdir("/tmp")
    sys.path[:] = setup["path"]
    for name in setup["packages"]:
        importlib.import_module(name)
    runner.prepare()
    gc.freeze()  # the collector would otherwise copy pages of this process into every fork


def _tuples(value: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _obey(
    command: dict[str, Any], descriptors: list[int], running: dict[int, int], limits: Limits, isolated: bool
) -> dict[str, Any]:
    if command["do"] == "end":
        first = int(command["id"])
        _end(first, running.pop(first))
        if not isolated:
            _end_strays(running)
        return {}
    (descriptor,) = descriptors
    try:
        first, guard = _start(descriptor, limits, isolated, command["folder"])
    except OSError as error:
        return {"problem": str(error)}
    finally:
        os.close(descriptor)
    running[first] = guard
    return {"id": first}


def _end(first: int, guard: int) -> None:
    """End a runner and its namespace. Once its guard is waited for, its pid is this process's own child or nobody's."""
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(first, os.WNOHANG) == (0, 0):
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)


def _end_strays(running: dict[int, int]) -> None:
    """Without process namespaces: end what programs left behind, which is this process's by now."""
    known = {*running.values()}
    for _ in range(_STRAY_ROUNDS):
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
            strays = {int(number) for number in file.read().split()} - known
        for number in strays:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        if not strays:
            return


def _start(descriptor: int, limits: Limits, isolated: bool, folder: str | None) -> tuple[int, int]:
    """Fork a guard, which forks the runner; (pid of the runner, pid of the guard).

    The guard is needed since a process that unshared its children's process namespace cannot do so again.
    """
    here, there = os.pipe()
    guard = os.fork()
    if not guard:
        _guard(descriptor, there, limits, isolated, folder)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        answer = pipe.read().decode()
    if not answer.isdigit():
        os.waitpid(guard, 0)
        raise OSError(answer or "the guard of a sandboxed program died")
    return int(answer), guard


def _guard(descriptor: int, there: int, limits: Limits, isolated: bool, folder: str | None) -> NoReturn:
    """Make the namespaces of one program, start its runner, tell its pid, and end when it and all its kin have."""
    try:
        kernel.die_with_parent()
        if isolated:
            room.enter_own_part(limits.tmp_mb)
        first = os.fork()
        if not first:
            os.close(there)
            runner.main(descriptor, limits, isolated, folder)
        os.close(descriptor)
        os.write(there, str(first).encode())
        os.close(there)
        os.waitpid(first, 0)
        os._exit(0)
    except BaseException as error:
        os.write(there, str(error).encode() or b"?")
        os._exit(1)
