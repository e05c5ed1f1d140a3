"""The process of one rank: builds a role's object, runs its methods one at a time and reports heartbeats."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray

from roll_gspo.errors import RollGspoError
from roll_gspo.execution.base import Closeable

_PR_SET_PDEATHSIG = 1
_MAX_KEPT_LOGS = 1000


@dataclass(frozen=True)
class ProcessContext:
    """Working folder and import path of the controller; a worker ignores folders that its machine lacks."""

    working_folder: str
    module_folders: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """Identity of a worker process. `started` distinguishes reuses of a `pid`; `host` is the IP of the node."""

    pid: int
    started: float
    host: str
    node_id: str


@dataclass(frozen=True)
class World:
    """The `torch.distributed` world that a worker joins; rank 0 hosts its store (a `StoreAddress`)."""

    rank: int
    size: int
    store: Any
    timeout_s: float


@dataclass(frozen=True)
class ProgressSlot:
    """Placeholder for the controller's progress callback in the arguments of a call."""


@dataclass(frozen=True)
class Heartbeat:
    """State of a worker: number of the running call (0: none), its seconds so far, and its progress."""

    call: int
    seconds: float
    done: int
    total: int


@dataclass(frozen=True)
class LogLine:
    """A log record of a worker."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """Result of a call.

    Attributes:
        value: the return value, if requested.
        error: the exception, if its type can be raised again in the controller.
        trace: the traceback; empty if the call succeeded.
        logs: log records since the previous outcome.
    """

    value: Any = None
    error: Exception | None = None
    trace: str = ""
    logs: tuple[LogLine, ...] = ()


class Worker:
    """One rank. Calls run in one thread; `heartbeat` runs in another."""

    def __init__(self, context: ProcessContext) -> None:
        _end_with_parent()
        faulthandler.enable()
        if Path(context.working_folder).is_dir():
            os.chdir(context.working_folder)
        sys.path.extend(p for p in context.module_folders if p not in sys.path and Path(p).is_dir())
        self._role: Closeable | None = None
        self._store: Any = None
        self._call, self._began = 0, time.monotonic()
        self._progress = (0, 0)
        self._logs: deque[LogLine] = deque(maxlen=_MAX_KEPT_LOGS)
        package_logger = logging.getLogger("roll_gspo")
        package_logger.setLevel(logging.INFO)
        package_logger.addHandler(_BufferHandler(self._logs))

    def identity(self) -> Identity:
        """Return the identity of the process, as soon as it is ready."""
        runtime = ray.get_runtime_context()
        started = psutil.Process().create_time()
        return Identity(os.getpid(), started, ray.util.get_node_ip_address(), runtime.get_node_id())

    def open_store(self, timeout_s: float) -> Any:
        """Open the rendezvous store of a world on rank 0 and return its `StoreAddress`."""
        from roll_gspo.rendezvous import open_store

        self._store, address = open_store(ray.util.get_node_ip_address(), timeout_s)
        return address

    def build(self, call: int, make: Callable[[], Closeable], world: World | None) -> Outcome:
        """Join `world`, if given, and build the object."""

        def work() -> None:
            if world is not None:
                self._join(world)
            self._role = make()

        return self._run(call, work, want_value=False)

    def call(self, call: int, method: str, packed: tuple[Any, ...], want_value: bool) -> Outcome:
        """Run a method of the object with the arguments `packed`."""
        args = [self._report if isinstance(arg, ProgressSlot) else arg for arg in packed]
        return self._run(call, lambda: getattr(self._role, method)(*args), want_value)

    @ray.method(concurrency_group="heartbeat")
    def heartbeat(self) -> Heartbeat:
        """Report the state of the worker; runs beside a call."""
        return Heartbeat(self._call, time.monotonic() - self._began, *self._progress)

    def _run(self, call: int, work: Callable[[], Any], want_value: bool) -> Outcome:
        self._progress = (0, 0)
        self._call, self._began = call, time.monotonic()
        try:
            value = work()
            return Outcome(value if want_value else None, logs=self._drain_logs())
        except Exception as error:
            kept = error if isinstance(error, RollGspoError) or type(error) is OSError else None
            return Outcome(error=kept, trace=traceback.format_exc(), logs=self._drain_logs())
        finally:
            self._call = 0

    def _join(self, world: World) -> None:
        import torch
        from torch import distributed as dist

        from roll_gspo.rendezvous import connect_store, group_backend, use_interface_of

        timeout = timedelta(seconds=world.timeout_s)
        store = self._store or connect_store(world.store, world.timeout_s)
        os.environ |= {"MASTER_ADDR": world.store.host, "MASTER_PORT": str(world.store.port)}
        use_interface_of(ray.util.get_node_ip_address())
        if torch.cuda.is_available():
            torch.cuda.set_device(0)  # the only visible device
        dist.init_process_group(group_backend(), store=store, rank=world.rank, world_size=world.size, timeout=timeout)

    def _report(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _drain_logs(self) -> tuple[LogLine, ...]:
        lines = tuple(self._logs)
        self._logs.clear()
        return lines


class _BufferHandler(logging.Handler):
    """Buffers log records until the next outcome carries them to the controller."""

    def __init__(self, lines: deque[LogLine]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(LogLine(record.name, record.levelno, record.getMessage()))


def _end_with_parent() -> None:
    """Have the kernel kill this process when the raylet exits; ignore Ctrl-C, which the controller handles."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
