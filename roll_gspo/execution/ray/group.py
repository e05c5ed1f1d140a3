"""Worker groups on Ray: one actor per rank, calls to one or all ranks, heartbeats and timeouts."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from roll_gspo.errors import WorkerDiedError, WorkerError, WorkerHungError
from roll_gspo.execution.base import (
    Closeable,
    Devices,
    ExecutionSettings,
    Pending,
    gather,
    most_telling,
    wait_first,
)
from roll_gspo.execution.ray.cluster import Cluster
from roll_gspo.execution.ray.worker import Heartbeat, Identity, Outcome, ProcessContext, ProgressSlot, Worker, World

logger = logging.getLogger(__name__)
_HEARTBEAT_INTERVAL_S = 0.25
_CLOSE_TIMEOUT_S = 10.0
_GRACE_S = 5.0  # after an error, for errors of other ranks that may explain it
WORKER_VARIABLE = "ROLL_GSPO_WORKER"  # names the worker of a process, e.g. in `ps e`
_MAX_CAUSE_CHARS = 400
_IDLE = Heartbeat(0, 0.0, 0, 0)
_CALLS = itertools.count(1)
_Actor: Any = ray.remote(concurrency_groups={"heartbeat": 1})(Worker)  # pyright: ignore[reportCallIssue]


@dataclass
class _Member:
    """The controller's view of one rank."""

    actor: Any
    identity: Identity
    heartbeat: Heartbeat = _IDLE
    request: Any = None
    requested_at: float = 0.0

    def poll_heartbeat(self) -> float:
        """Request a heartbeat at intervals; return for how many seconds the current request is unanswered."""
        now = time.monotonic()
        if self.request is None:
            if now - self.requested_at > _HEARTBEAT_INTERVAL_S:
                self.request, self.requested_at = self.actor.heartbeat.remote(), now
            return 0.0
        answered, _ = ray.wait([self.request], timeout=0)
        if not answered:
            return now - self.requested_at
        with suppress(RayError):  # the call itself raises if the worker died
            self.heartbeat = ray.get(self.request)
        self.request = None
        return 0.0


class RayPending:
    """`Pending` of a call on one or more ranks of a group."""

    def __init__(self, group: RayGroup, method: str, number: int, open_refs: dict[Any, int], timeout_s: float) -> None:
        self._group = group
        self._method = method
        self._number = number
        self._open = open_refs
        self._first = min(open_refs.values())
        self._timeout_s = timeout_s
        self._value: Any = None
        self._errors: list[Exception] = []
        self._settled_at = 0.0
        self.progress = (0, 0)

    @property
    def open_refs(self) -> Iterable[Any]:
        """Ray's references to the results that have not been taken."""
        return self._open.keys()

    def done(self) -> bool:
        """Return whether `result` would not block; also check heartbeats and timeouts."""
        if self._open:
            finished, _ = ray.wait(list(self._open), num_returns=len(self._open), timeout=0)
            for ref in finished:
                self._take(self._open.pop(ref), ref)
        for rank in list(self._open.values()):
            self._check_worker(rank)
        if not self._open:
            return True
        if not self._errors or time.monotonic() < self._settled_at:
            return False
        # The other ranks wait in a collective for a rank that died or has left the call.
        self._open.clear()
        self._group.fail(str(most_telling(self._errors)))
        return True

    def result(self) -> Any:
        """Wait for all called ranks and return the result of the first one."""
        wait_first([self])
        if self._errors:
            raise most_telling(self._errors)
        return self._value

    def _take(self, rank: int, ref: Any) -> None:
        try:
            outcome: Outcome = ray.get(ref)
        except RayActorError as error:
            text = self._group.describe_death(rank, self._method, error)
            self._lost(rank, WorkerDiedError(text))
            return
        except Exception as error:  # raised by Ray, e.g. if the return value does not pickle
            self._fail(WorkerError(f"{self._group.describe(rank)} failed in '{self._method}': {error}"))
            return
        self._group.relay(rank, outcome)
        if outcome.trace:
            self._fail(self._translated(rank, outcome))
        elif rank == self._first:
            self._value = outcome.value

    def _translated(self, rank: int, outcome: Outcome) -> Exception:
        error = outcome.error
        if isinstance(error, OSError):
            return type(error)(error.errno, f"{error.strerror} ({self._group.name} rank {rank})", error.filename)
        if error is not None:
            return type(error)(f"{error} ({self._group.name} rank {rank})")
        last = outcome.trace.strip().splitlines()[-1]
        return WorkerError(f"{self._group.describe(rank)} failed in '{self._method}': {last}\n{outcome.trace.rstrip()}")

    def _check_worker(self, rank: int) -> None:
        member = self._group.member(rank)
        if member is None:
            return
        silent_s = member.poll_heartbeat()
        heartbeat = member.heartbeat
        if heartbeat.call == self._number and rank == self._first:
            self.progress = (heartbeat.done, heartbeat.total)
        limit = self._group.settings.heartbeat_timeout_s
        if silent_s > limit:
            text = f"{silent_s:.0f} s without a heartbeat during '{self._method}' (heartbeat_timeout_s {limit:g})"
        elif heartbeat.call == self._number and heartbeat.seconds > self._timeout_s:
            text = f"{heartbeat.seconds:.0f} s in '{self._method}' (worker_timeout_s {self._timeout_s:g})"
        else:
            return
        for ref in [ref for ref, number in self._open.items() if number == rank]:
            del self._open[ref]
        self._lost(rank, WorkerHungError(f"{self._group.describe(rank)}: killed after {text}"))

    def _fail(self, error: Exception) -> None:
        self._errors.append(error)
        self._settled_at = self._settled_at or time.monotonic() + _GRACE_S

    def _lost(self, rank: int, error: WorkerError) -> None:
        self._errors.append(error)
        self._group.lose(rank, str(error))
        self._open = {ref: number for ref, number in self._open.items() if self._group.alive(number)}


class RayGroup:
    """`WorkerGroup` of Ray actors.

    Args:
        name: name of the role.
        make: builds the object of each rank.
        devices: devices of the ranks.
        one_world: the ranks join one `torch.distributed` world; if one is lost, all are killed.
        cluster: the cluster that reserved the devices.
        settings: time limits and environment.

    Raises:
        WorkerError: a worker does not start.
        RollGspoError: raised by `make`.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Closeable],
        devices: Devices,
        one_world: bool,
        cluster: Cluster,
        settings: ExecutionSettings,
    ) -> None:
        self.name = name
        self.size = devices.num_workers
        self.settings = settings
        self._make = make
        self._devices = devices
        self._one_world = one_world
        self._cluster = cluster
        self._members: list[_Member | None] = [None] * self.size
        self._why = ""
        self._checked_at = 0.0
        self._start(range(self.size))

    def submit(self, method: str, *args: Any, rank: int | None = None) -> RayPending:
        """Start a call; the arguments are put into the object store once for all ranks."""
        packed = ray.put(tuple(ProgressSlot() if callable(arg) else arg for arg in args))
        return self._submit(method, rank, lambda actor, call, first: actor.call.remote(call, method, packed, first))

    def call(self, method: str, *args: Any, rank: int | None = None) -> Any:
        """Start a call and wait for its result."""
        progress: Any = next((arg for arg in args if callable(arg)), None)
        return gather([self.submit(method, *args, rank=rank)], progress)[0]

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Pending]:
        """Wait until at least one call is done and return all that are. Heartbeats are checked at intervals."""
        calls = cast(Sequence[RayPending], pendings)
        refs = [ref for call in calls for ref in call.open_refs]
        if refs:
            ray.wait(refs, timeout=timeout_s)
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        check = time.monotonic() - self._checked_at > _HEARTBEAT_INTERVAL_S
        if check:
            self._checked_at = time.monotonic()
        return [c for c in calls if (check or not c.open_refs or not ready.isdisjoint(c.open_refs)) and c.done()]

    def host(self, rank: int) -> str:
        """Return the IP address of the node of a rank."""
        return self._known(rank).identity.host

    def pid(self, rank: int) -> int:
        """Return the process ID of a rank."""
        return self._known(rank).identity.pid

    def alive(self, rank: int) -> bool:
        """Return False if the worker was found dead or was killed."""
        return self._members[rank] is not None

    def restart(self, rank: int) -> None:
        """Restart a replica with a new object."""
        if self._one_world:
            raise ValueError(f"{self.name}: a rank of a world cannot be restarted alone")
        self._kill(rank)
        self._why = ""
        self._start([rank])

    def kill(self) -> None:
        """Kill every process."""
        self.fail("killed")

    def close(self) -> None:
        """Close every object, then end its process."""
        living = [rank for rank in range(self.size) if self.alive(rank)]
        pendings: list[Pending] = [self.submit("close", rank=rank) for rank in living]
        until = time.monotonic() + _CLOSE_TIMEOUT_S
        while pendings and time.monotonic() < until:
            for pending in wait_first(pendings, timeout_s=0.1):
                pendings.remove(pending)
                try:
                    pending.result()
                except Exception as error:
                    logger.warning("closing %s failed: %s", self.name, error)
        self.fail("closed")

    # used by RayPending

    def member(self, rank: int) -> _Member | None:
        """Return the state of a rank, or None if it is dead."""
        return self._members[rank]

    def describe(self, rank: int) -> str:
        """Return the description of a rank for error messages."""
        member = self._members[rank]
        where = f" (process {member.identity.pid} on {member.identity.host})" if member else ""
        return f"{self.name}: rank {rank}{where}"

    def relay(self, rank: int, outcome: Outcome) -> None:
        """Log the records of a worker in the controller; of one world only those of rank 0."""
        if rank == 0 or not self._one_world:
            for line in outcome.logs:
                logging.getLogger(line.logger).log(line.level, "%s", line.text)

    def describe_death(self, rank: int, method: str, error: RayActorError) -> str:
        """Return Ray's explanation of a worker's death, in one line."""
        text = " ".join(str(error).split())
        detail = re.search(
            r"(?:Worker exit detail: |cause was |The actor died because |The actor is dead because )(.*)", text
        )
        cause = (detail[1] if detail else text).partition(" Some common causes")[0]
        return f"{self.describe(rank)} died during '{method}': {cause[:_MAX_CAUSE_CHARS].rstrip('. ')}"

    def lose(self, rank: int, why: str) -> None:
        """Kill a lost rank; in one world, all ranks."""
        if self._one_world:
            self.fail(why)
        else:
            self._kill(rank)

    def fail(self, why: str) -> None:
        """Kill all ranks; later calls report `why`."""
        self._why = self._why or why
        for rank in range(self.size):
            self._kill(rank)

    # start and end of workers

    def _start(self, ranks: Sequence[int]) -> None:
        try:
            actors = {rank: self._actor(rank) for rank in ranks}
            identities = {rank: actor.identity.remote() for rank, actor in actors.items()}
            for rank, ref in identities.items():
                self._members[rank] = _Member(actors[rank], self._identity(rank, ref))
            store: Any = None
            if self._one_world:
                store = ray.get(
                    self._known(0).actor.open_store.remote(self.settings.call_timeout_s),
                    timeout=self.settings.start_timeout_s,
                )
            pendings = [self._build(rank, store) for rank in ranks]
            gather(pendings)
        except BaseException as error:
            self.fail(f"start failed: {error}")
            raise

    def _actor(self, rank: int) -> Any:
        return _Actor.options(
            num_cpus=0,
            num_gpus=0,
            max_restarts=0,
            scheduling_strategy=self._cluster.strategy(self._devices, rank),
            runtime_env={"env_vars": self._environment(rank)},
        ).remote(ProcessContext(os.getcwd(), tuple(os.path.abspath(folder) for folder in sys.path)))

    def _environment(self, rank: int) -> dict[str, str]:
        environment = {**self.settings.environment, WORKER_VARIABLE: f"{self.name} rank {rank}"}
        if self._one_world:
            node = self._devices.node_of(rank)
            before = sum(self._devices.node_of(other) == node for other in range(rank))
            environment |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                # a worker sees only its own GPUs
                "LOCAL_RANK": "0" if self._cluster.uses_gpus else str(before),
            }
        return environment | self._cluster.environment(self._devices, rank)

    def _identity(self, rank: int, ref: Any) -> Identity:
        limit = self.settings.start_timeout_s
        try:
            return ray.get(ref, timeout=limit)
        except GetTimeoutError as error:
            raise WorkerHungError(f"{self.name}: rank {rank} did not start within {limit:g} s") from error
        except RayError as error:
            raise WorkerDiedError(f"{self.name}: rank {rank} could not be started: {error}") from error

    def _build(self, rank: int, store: Any) -> RayPending:
        world = World(rank, self.size, store, self.settings.call_timeout_s) if store else None
        return self._submit("start", rank, lambda actor, call, _: actor.build.remote(call, self._make, world))

    def _submit(self, method: str, rank: int | None, send: Callable[[Any, int, bool], Any]) -> RayPending:
        number, refs = next(_CALLS), {}
        ranks = range(self.size) if rank is None else [rank]
        for each in ranks:
            if self._members[each] is None:
                self._raise_dead(each, method)
        for each in ranks:
            refs[send(self._known(each).actor, number, each == ranks[0])] = each
        return RayPending(self, method, number, refs, self.settings.call_timeout_s)

    def _raise_dead(self, rank: int, method: str) -> NoReturn:
        reason = f" ({self._why})" if self._why else ""
        raise WorkerDiedError(f"{self.name}: rank {rank} is dead and cannot run '{method}'{reason}")

    def _known(self, rank: int) -> _Member:
        member = self._members[rank]
        if member is None:
            self._raise_dead(rank, "a call")
        return member

    def _kill(self, rank: int) -> None:
        """Kill a worker through Ray and, on this node, by SIGKILL: a stopped process ignores Ray."""
        member, self._members[rank] = self._members[rank], None
        if member is None:
            return
        ray.kill(member.actor, no_restart=True)
        if member.identity.node_id == self._cluster.own_node_id:
            kill_family(member.identity.pid, member.identity.started)


def kill_family(pid: int, started: float) -> None:
    """Send SIGKILL to a process of this machine and its children, if its start time matches `started`."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1:
            return
        for each in [*process.children(recursive=True), process]:
            each.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return
