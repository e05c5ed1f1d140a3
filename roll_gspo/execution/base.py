"""The interface between a pipeline and the processes that run its roles.

A role is one object. A role with devices can run as a *worker group*: processes that each hold one such object. They
are either the ranks of one `torch.distributed` world, which all receive the same calls, or independent replicas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from roll_gspo.errors import ConfigError, WorkerDiedError, WorkerError, WorkerHungError

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_GRACE_S = 5.0
_LONGEST_NAP_S = 0.05


class Closeable(Protocol):
    """An object that owns an engine or processes."""

    def close(self) -> None:
        """Release all resources. Further calls do nothing."""
        ...


RoleT = TypeVar("RoleT", bound=Closeable)


@dataclass(frozen=True)
class Devices:
    """The devices of a role.

    Attributes:
        numbers: device numbers in rank order: GPUs, or worker slots on a machine without GPUs.
        per_worker: devices per worker (the tensor-parallel size of an engine).
        per_node: devices per node; device d is on node `d // per_node`.
    """

    numbers: tuple[int, ...]
    per_worker: int
    per_node: int

    @property
    def num_workers(self) -> int:
        """Number of processes in the group."""
        return len(self.numbers) // self.per_worker

    def of_worker(self, rank: int) -> tuple[int, ...]:
        """Return the device numbers of worker `rank`."""
        return self.numbers[rank * self.per_worker : (rank + 1) * self.per_worker]

    def node_of(self, rank: int) -> int:
        """Return the node of worker `rank`, counted from 0.

        Raises:
            ConfigError: the devices of the worker are on two nodes.
        """
        devices = self.of_worker(rank)
        nodes = {device // self.per_node for device in devices}
        if len(nodes) > 1:
            raise ConfigError(
                f"device_mapping: devices {devices[0]}-{devices[-1]} of one worker are on nodes {sorted(nodes)} "
                f"(num_gpus_per_node {self.per_node}); give each worker devices of one node"
            )
        return nodes.pop()


@dataclass(frozen=True)
class ExecutionSettings:
    """Settings of an executor.

    Attributes:
        devices: all device numbers that any role uses.
        devices_per_node: device d is on node `d // devices_per_node`.
        call_timeout_s: time limit of a call; a worker that exceeds it is killed.
        heartbeat_timeout_s: a worker is killed after this time without a heartbeat.
        start_timeout_s: time limit for the start of an empty worker process.
        environment: environment variables of every worker.
    """

    devices: tuple[int, ...] = (0,)
    devices_per_node: int = 8
    call_timeout_s: float = 1800.0
    heartbeat_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    environment: Mapping[str, str] = field(default_factory=dict)


class Pending(Protocol):
    """A running call on one or more workers."""

    def done(self) -> bool:
        """Return whether `result` would not block. Polling also checks heartbeats and timeouts, so poll often."""
        ...

    def result(self) -> Any:
        """Wait for all called ranks and return the result of the first one.

        Raises:
            WorkerDiedError, WorkerHungError: a worker died or does not respond.
            RollGspoError: the same type that a worker raised, with role and rank added.
            WorkerError: a worker raised any other exception.
        """
        ...

    @property
    def progress(self) -> tuple[int, int]:
        """Last (done, total) reported by the first called rank; (0, 0) before the first report."""
        ...


class WorkerGroup(Protocol):
    """Processes that each hold one object of a role."""

    @property
    def name(self) -> str:
        """Name of the role."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def submit(self, method: str, *args: Any, rank: int | None = None) -> Pending:
        """Start `method(*args)` on every rank, or only on `rank`.

        A callable in `args` is a progress callback: the worker receives a replacement that feeds `Pending.progress`.
        """
        ...

    def call(self, method: str, *args: Any, rank: int | None = None) -> Any:
        """Call `submit` and wait for the result; a callable in `args` receives the progress meanwhile."""
        ...

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Pending]:
        """Wait until at least one of this group's calls is done and return all that are; empty after `timeout_s`."""
        ...

    def host(self, rank: int) -> str:
        """Return the IP address of the node of a rank."""
        ...

    def alive(self, rank: int) -> bool:
        """Return False if the worker was found dead or was killed."""
        ...

    def restart(self, rank: int) -> None:
        """Restart a replica with a new object."""
        ...

    def lose(self, rank: int, why: str) -> None:
        """Kill a worker that does not return, so that it counts as lost; in one world, every worker."""
        ...

    def kill(self) -> None:
        """Kill every process."""
        ...

    def close(self) -> None:
        """Close every object, then end its process."""
        ...


class Executor(Protocol):
    """Starts roles and manages their lifetime; roles do not depend on the executor."""

    def start(self, name: str, make: Callable[[], RoleT], devices: Devices | None = None) -> RoleT:
        """Build a role in this process or on `devices` and return an object with its methods.

        Args:
            name: the role's name in the configuration.
            make: builds the role; it is sent to every rank, so it must pickle if `devices` is given.
            devices: one rank per device; None builds the role in this process.
        """
        ...

    def close(self) -> None:
        """Close every role in reverse order of start, even if one of them raises."""
        ...


class ClusterExecutor(Executor, Protocol):
    """An executor that starts worker processes."""

    @property
    def uses_gpus(self) -> bool:
        """True if devices are GPUs, false if they are worker slots."""
        ...

    def start_group(
        self,
        name: str,
        make: Callable[[], Closeable],
        devices: Devices,
        *,
        one_world: bool,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> WorkerGroup:
        """Build one object per worker, as ranks of one world or as replicas.

        `environment` has variables of these workers, which the settings of the executor replace.
        """
        ...


class RemoteRole:
    """Forwards method calls to all ranks of a group and returns the result of rank 0."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._group.call, method)

    def close(self) -> None:
        """Close the group."""
        self._group.close()


def wait_first(pendings: Sequence[Pending], timeout_s: float | None = None) -> list[Pending]:
    """Wait until at least one call is done and return all that are; empty after `timeout_s`."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    nap = 0.001
    while True:
        if done := [pending for pending in pendings if pending.done()]:
            return done
        if until is not None and time.monotonic() >= until:
            return []
        time.sleep(nap)
        nap = min(nap * 2, _LONGEST_NAP_S)


def gather(pendings: Iterable[Pending], progress: Progress | None = None) -> list[Any]:
    """Wait for concurrent calls and return their results in order.

    Raises:
        RollGspoError: the error of the first call that fails. It is raised after a short grace period, because the
            death of a worker explains the errors of the other calls better.
    """
    waiting = list(pendings)
    every = list(waiting)
    errors: list[Exception] = []
    until = 0.0
    while waiting and (not errors or time.monotonic() < until):
        for pending in wait_first(waiting, timeout_s=0.25):
            waiting.remove(pending)
            try:
                pending.result()
            except Exception as error:
                errors.append(error)
                until = until or time.monotonic() + _GRACE_S
        if any(isinstance(error, WorkerDiedError | WorkerHungError) for error in errors):
            break
        if progress is not None and every[0].progress[1]:
            progress(*every[0].progress)
    if errors:
        raise most_telling(errors)
    return [pending.result() for pending in every]


def most_telling(errors: Sequence[Exception]) -> Exception:
    """Return the root cause among the errors of one collective call.

    A dead or hung worker explains all others; an error of this package explains generic worker errors.
    """
    ranking = (WorkerDiedError, WorkerHungError)
    for kind in ranking:
        for error in errors:
            if isinstance(error, kind):
                return error
    return next((error for error in errors if not isinstance(error, WorkerError)), errors[0])
