"""A pool of reusable, killable worker processes that compute one reward."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from roll_gspo.errors import RewardError
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.catalog import RewardSpec
from roll_gspo.rewards.process import WorkerDiedError, WorkerProcess
from roll_gspo.rewards.round import Round

logger = logging.getLogger(__name__)

_CHUNKS_PER_WORKER = 4  # few enough requests in a message that no worker idles at the end
_LONGEST_WAIT_S = 60.0
_MAX_REASONS = 7  # in a warning, beside the first
_MAX_DEAD_STARTS = 3  # on end


class RewardPool:
    """Scores responses in `num_workers` processes, started when first needed and kept until `close`.

    A sample whose reward raises, returns no finite number, hangs or kills its process (twice) is marked as failed; no
    other sample is touched. The processes end with the pool, and with this process, however that ends. Rounds are
    worked off one after another, whichever thread they come from.

    Args:
        spec: of the reward, which is built once in each process.
        num_workers: processes.
        timeout_s: for one sample, by the clock; the process that takes longer is killed and replaced. A batch of n
            samples may take n times as long; one that takes longer is scored again, each sample alone.
        where: key path of the reward's block, for errors and warnings.
        start_timeout_s: for importing and building the reward.
        max_batch: requests that a process is sent at once, and so the most that a `BatchReward` is asked together.
        max_memory_mb: what a process may allocate; None: no limit.
    """

    def __init__(
        self,
        spec: RewardSpec,
        num_workers: int,
        timeout_s: float,
        where: str,
        start_timeout_s: float = 120.0,
        max_batch: int = 32,
        max_memory_mb: int | None = None,
    ) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise RewardError(f"{where}: {num_workers} workers with {timeout_s:g} s a sample; both must be positive")
        self._spec = spec
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._where = where
        self._start_timeout_s = start_timeout_s
        self._max_batch = max_batch
        self._max_memory_mb = max_memory_mb
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._wake_up, self._woken = socket.socketpair()
        self._wake_up.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._closed = False
        self._has_started = False
        self._dead_starts = 0
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the processes that are there now; each is also the id of its process group."""
        return [worker.pid for worker in self._workers]

    def check(self) -> None:
        """Start every process and wait until its reward is built, so that problems show before training.

        Raises:
            ConfigError, MissingDependencyError: the reward's target or arguments are wrong.
            RewardError: the reward cannot be built, its process died, or it was not ready in time.
        """
        with self._lock, self._killing_on_error():
            self._start_up_to(self._num_workers)
            while not all(worker.ready for worker in self._workers):
                for worker in self._wait(WorkerProcess.raise_not_ready):
                    if worker.ready:  # it has nothing to say: it died
                        self._remove(worker)
                    else:
                        self._receive_ready(worker)

    def score(
        self, requests: Sequence[RewardRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[RewardResult]:
        """Score all requests, in order.

        Args:
            requests: any number.
            progress: called with (finished samples, all samples).

        Raises:
            ConfigError, MissingDependencyError, RewardError: a process cannot be started (see `check`).
        """
        work = self.new_round()
        for request in requests:
            work.submit(request)
        work.finish()
        return self.run(work, progress)

    def new_round(self) -> Round:
        """An empty round, for a thread that calls `run` while others submit to it."""
        return Round(self._wake)

    def run(self, work: Round, progress: Callable[[int, int], None] | None = None) -> list[RewardResult]:
        """Score what is in the round and what still comes, until it is finished; in the order of `submit`.

        Raises:
            RoundCancelled: it was cancelled; the processes that were at work are gone.
            ConfigError, MissingDependencyError, RewardError: as `score`.
        """
        with self._lock, self._killing_on_error():
            work.drain()
            while not work.finished:
                self._start_up_to(min(self._num_workers, work.num_open))
                self._hand_out(work)
                for worker in self._wait(lambda late: self._give_up(late, work)):
                    self._take_message(worker, work)
                if progress is not None:
                    progress(len(work.results), len(work.requests))
                work.drain()
        results = work.ordered_results()
        self._warn_of_failures(work.requests, results)
        return results

    def close(self) -> None:
        """End all processes; the pool cannot be used afterwards."""
        with self._lock:
            self._closed = True
            self._kill_workers()
            self._selector.close()
            self._wake_up.close()
            self._woken.close()
        self._finalizer.detach()

    def _wake(self) -> None:
        # Refused where it is full, and then it wakes all the same; or closed, and then nobody waits.
        with contextlib.suppress(OSError):
            self._wake_up.send(b"!")

    def _start_up_to(self, num_workers: int) -> None:
        if self._closed:
            raise RewardError(f"{self._where}: the pool is closed; make a new one")
        while len(self._workers) < num_workers:
            worker = WorkerProcess(self._spec, self._where, self._start_timeout_s, self._max_memory_mb)
            self._workers.append(worker)
            self._selector.register(worker, selectors.EVENT_READ, worker)

    def _hand_out(self, work: Round) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if not work.pending:
                return
            chunks = self._num_workers if worker.takes_batches else _CHUNKS_PER_WORKER * self._num_workers
            taken = work.take(min(-(-len(work.pending) // chunks), self._max_batch))
            try:
                worker.assign(taken, [work.requests[i] for i in taken], self._timeout_s)
            except OSError:  # it died while it had nothing to do: no sample's fault
                work.requeue(taken)
                self._remove(worker)

    def _wait(self, on_late: Callable[[WorkerProcess], None]) -> list[WorkerProcess]:
        """Workers that have a message, once one has; `on_late` is called for each whose time is up without one.

        Ends without one, too: when the pool was woken, and after a while.
        """
        waited_for = [w for w in self._workers if not w.idle]
        until = min((w.deadline - time.monotonic() for w in waited_for), default=_LONGEST_WAIT_S)
        speaking = self._poll(min(max(0.0, until), _LONGEST_WAIT_S))
        now = time.monotonic()
        for worker in waited_for:
            # A worker whose message is there is not late, however busy this process was meanwhile.
            if now >= worker.deadline and worker not in speaking and worker not in self._poll(0):
                on_late(worker)
        return speaking

    def _give_up(self, late: WorkerProcess, work: Round) -> None:
        if not late.ready:
            late.raise_not_ready()
        if not self._took_batch_apart(late, work):
            self._fail_current(late, work, f"timeout after {self._timeout_s:g} s")

    def _poll(self, timeout_s: float) -> list[WorkerProcess]:
        speaking = [key.data for key, _ in self._selector.select(timeout_s)]
        if None in speaking:
            self._woken.recv(4096)
        return [worker for worker in speaking if worker is not None]

    def _take_message(self, worker: WorkerProcess, work: Round) -> None:
        if not worker.ready:
            self._receive_ready(worker)
        elif worker.idle:  # it can only have died
            self._remove(worker)
        else:
            try:
                begin = worker.busy_since
                index, result = worker.receive_result(self._timeout_s)
                work.results[index] = result
                work.spans.append((begin, worker.busy_since))
            except (EOFError, OSError):
                self._lost(worker, work)

    def _receive_ready(self, worker: WorkerProcess) -> None:
        """Where a process has started before, one that dies on its way (out of memory, say) does not end the run."""
        try:
            worker.receive_ready()
        except WorkerDiedError as error:
            self._dead_starts += 1
            if not self._has_started or self._dead_starts > _MAX_DEAD_STARTS:
                raise
            logger.warning("%s; starting another", error)
            self._remove(worker)
        else:
            self._has_started, self._dead_starts = True, 0

    def _lost(self, worker: WorkerProcess, work: Round) -> None:
        """A worker died: its sample is tried once more, for whoever killed it may have been someone else."""
        if self._took_batch_apart(worker, work):
            return
        current = worker.assigned[0]
        if current in work.lost:
            self._fail_current(worker, work)
            return
        work.lost.add(current)
        self._end(worker, work)
        work.requeue(worker.assigned)

    def _took_batch_apart(self, worker: WorkerProcess, work: Round) -> bool:
        """Where a batch hung or died nobody knows whose fault it was: each of its samples is tried alone."""
        if not worker.takes_batches or len(worker.assigned) < 2:
            return False
        self._end(worker, work)
        work.alone.update(worker.assigned)
        work.requeue(worker.assigned)
        return True

    def _fail_current(self, worker: WorkerProcess, work: Round, reason: str | None = None) -> None:
        """Mark the sample that the worker was at (by default: it died), and give back its others to be scored."""
        ended = self._end(worker, work)
        current, *others = worker.assigned
        work.results[current] = RewardResult(0.0, reason or f"its worker process {ended}")
        work.requeue(others)

    def _end(self, worker: WorkerProcess, work: Round) -> str:
        work.spans.append((worker.busy_since, time.monotonic()))
        return self._remove(worker)

    def _remove(self, worker: WorkerProcess) -> str:
        self._selector.unregister(worker)
        self._workers.remove(worker)
        return worker.kill()

    def _kill_workers(self) -> None:
        for worker in list(self._workers):
            self._remove(worker)

    @contextlib.contextmanager
    def _killing_on_error(self) -> Iterator[None]:
        """After an error or Ctrl-C no worker may be left that still answers the interrupted call."""
        try:
            yield
        except BaseException:
            self._kill_workers()
            raise

    def _warn_of_failures(self, requests: Sequence[RewardRequest], results: Sequence[RewardResult]) -> None:
        failures = [(r, request) for r, request in zip(results, requests, strict=True) if r.failed]
        if failures:
            first, request = failures[0]
            others = Counter(result.failed for result, _ in failures if result.failed != first.failed)
            listed = "".join(f"; {count} times: {reason}" for reason, count in others.most_common(_MAX_REASONS))
            logger.warning(
                "%s: %d of %d samples failed, first (row %s): %s%s",
                *(self._where, len(failures), len(results), request.row.get("id", "?"), first.failed, listed),
            )


def _kill_all(workers: list[WorkerProcess], owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork of this process must not end its parent's workers
        for worker in workers:
            worker.kill()
