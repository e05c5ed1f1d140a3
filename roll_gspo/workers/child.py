"""Serving loop of worker processes: they end with their parent, limit their memory and kill what they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_PARENT_CHECK_S = 0.5
_PR_SET_CHILD_SUBREAPER = 36


def serve(descriptor: int, parent_pid: int, answer: Callable[[socket.socket], None]) -> None:
    """Run `answer` until it ends, the pool closes the connection or its process ends. Never returns.

    Args:
        descriptor: file descriptor of the socket to the pool.
        parent_pid: process id of the pool.
        answer: receives the messages of the pool and sends the results.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    adopt_orphans()
    exit_with_parent(parent_pid)
    try:
        answer(connection)
    except (EOFError, ConnectionError):
        pass  # the pool closed the connection, or its process ended
    except BaseException:
        traceback.print_exc()
    finally:
        _kill_own_group()


def limit_memory(max_memory_mb: int | None) -> None:
    """Limit the memory of this process, and make it the kernel's first choice when the machine runs out of memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if max_memory_mb is not None:  # not RLIMIT_AS: libraries map much more address space than they use
        resource.setrlimit(resource.RLIMIT_DATA, (max_memory_mb << 20, max_memory_mb << 20))


def message_of(error: BaseException) -> str:
    """Return the text of an exception, whatever its `__str__` does."""
    try:
        return str(error)
    except Exception:
        return "(no message: str() of the exception failed)"


def adopt_orphans() -> None:
    """Become the parent of processes whose parent ends, so that daemons of the code are found and killed."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def exit_with_parent(parent_pid: int) -> None:
    """Watch the parent in a thread. When it ends, kill this process, its group and what it started."""
    threading.Thread(target=_wait_for_end_of, args=(parent_pid,), daemon=True).start()


def _wait_for_end_of(parent_pid: int) -> None:
    # Poll the kernel instead of the connection, whose other end may be held open by a fork of the parent. Linux's
    # PR_SET_PDEATHSIG fires when the parent *thread* ends, which may be short-lived.
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_CHECK_S)
    _kill_own_group()


def kill_descendants() -> None:
    """Kill what this process started."""
    with contextlib.suppress(Exception):
        import psutil

        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _kill_own_group() -> None:
    """Kill what the code started, and the process group, which the pool created for this process."""
    kill_descendants()
    os.killpg(os.getpgid(0), signal.SIGKILL)
