"""The worker processes of a reward pool: start, wait for messages, replace, kill."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
import uuid
import weakref
from collections.abc import Callable

from roll_gspo.errors import RewardError
from roll_gspo.rewards.process import WorkerProcess
from roll_gspo.rewards.spec import RewardSpec
from roll_gspo.workers.output import WorkerOutput
from roll_gspo.workers.process import WorkerProgram, WorkerStartError, kill_marked

logger = logging.getLogger(__name__)

_MAX_WAIT_S = 60.0
_MAX_CONSECUTIVE_FAILED_STARTS = 3


class WorkerSet:
    """Worker processes of one reward. One thread uses the set; `wake`, `pids` and `next_step` are safe in any thread.

    The processes end with the set and with the process that owns it, however it ends.

    Args:
        spec: spec of the reward, which is built once per process.
        key: key path of the reward's block, for errors and warnings.
        start_timeout_s: seconds to import and build the reward.
        max_memory_mb: MiB that a process may allocate; None for no limit.
    """

    def __init__(self, spec: RewardSpec, key: str, start_timeout_s: float, max_memory_mb: int | None) -> None:
        self._program = WorkerProgram(
            module="roll_gspo.rewards.worker",
            setup=(spec, max_memory_mb),
            key=key,
            title=f"reward {spec.name}",
            start_timeout_s=start_timeout_s,
            error=RewardError,
        )
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._has_started = False
        self._failed_starts = 0
        self._mark = uuid.uuid4().hex
        self._output = WorkerOutput(key)
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    @property
    def pids(self) -> list[int]:
        """Process ids of the current workers; each is also the id of a process group."""
        return [worker.pid for worker in list(self._workers)]

    @property
    def all_ready(self) -> bool:
        """True if every process has built its reward."""
        return all(worker.ready for worker in self._workers)

    @property
    def idle(self) -> list[WorkerProcess]:
        """Workers that are ready and have no requests."""
        return [worker for worker in self._workers if worker.idle]

    @property
    def busy(self) -> list[WorkerProcess]:
        """Workers that have requests."""
        return [worker for worker in self._workers if worker.assigned]

    def start_up_to(self, num_workers: int) -> None:
        """Start processes until there are `num_workers`."""
        while len(self._workers) < num_workers:
            try:
                worker = WorkerProcess(self._program, self._output, self._mark)
            except WorkerStartError as error:
                raise RewardError(str(error)) from None
            self._workers.append(worker)
            self._selector.register(worker, selectors.EVENT_READ, worker)

    def wait(self, on_timeout: Callable[[WorkerProcess], None]) -> list[WorkerProcess]:
        """Wait for messages and return the workers that sent one.

        The result is empty if the set was woken, or after 60 s.

        Args:
            on_timeout: called for each worker that sent no message before its deadline.
        """
        busy = [w for w in self._workers if not w.idle]
        until = min((w.deadline - time.monotonic() for w in busy), default=_MAX_WAIT_S)
        readable = self._poll(min(max(0.0, until), _MAX_WAIT_S))
        now = time.monotonic()
        for worker in busy:
            # A worker whose message has arrived is not late, even if this process was too busy to read it.
            if now >= worker.deadline and worker not in readable and worker not in self._poll(0):
                on_timeout(worker)
        return readable

    def wake(self) -> None:
        """Let `wait` return."""
        # `send` fails if a wake-up is already pending (buffer full) or the set is closed; both are fine.
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"!")

    def receive_ready(self, worker: WorkerProcess) -> None:
        """Receive the ready message.

        Once a worker has started, a later one that dies during its start (e.g. out of memory) is replaced.

        Raises:
            ConfigError, MissingDependencyError, RewardError: the reward cannot be built.
        """
        try:
            worker.receive_ready()
        except WorkerStartError as error:
            self._failed_starts += 1
            if not self._has_started or self._failed_starts > _MAX_CONSECUTIVE_FAILED_STARTS:
                raise RewardError(str(error)) from None
            logger.warning("%s; starting another worker", error)
            self.remove(worker)
        else:
            self._has_started, self._failed_starts = True, 0

    def remove(self, worker: WorkerProcess) -> str:
        """Kill a worker and return how its process ended."""
        self._selector.unregister(worker)
        self._workers.remove(worker)
        return worker.kill()

    def kill(self) -> None:
        """Kill all workers."""
        for worker in list(self._workers):
            self.remove(worker)

    def next_step(self) -> None:
        """Report output that was dropped, and start counting anew."""
        self._output.next_step()

    def close(self) -> None:
        """Kill all processes, including those that the reward started. The set cannot be used afterwards."""
        self.kill()
        kill_marked(self._mark)
        self._output.close()
        self._selector.close()
        self._wake_sender.close()
        self._wake_receiver.close()
        self._finalizer.detach()

    def _poll(self, timeout_s: float) -> list[WorkerProcess]:
        readable = [key.data for key, _ in self._selector.select(timeout_s)]
        if None in readable:
            self._wake_receiver.recv(4096)
        return [worker for worker in readable if worker is not None]


def _kill_all(workers: list[WorkerProcess], owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork of the owner must not kill the owner's workers
        for worker in workers:
            worker.kill()
