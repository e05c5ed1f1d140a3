"""A pool of worker processes that compute one reward."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from roll_gspo.errors import RewardError
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.job import ScoringJob
from roll_gspo.rewards.output import WorkerOutput
from roll_gspo.rewards.process import WorkerProcess, WorkerStartError, kill_marked
from roll_gspo.rewards.spec import RewardSpec

logger = logging.getLogger(__name__)

_CHUNKS_PER_WORKER = 4  # small messages, so that all workers finish at about the same time
_MAX_WAIT_S = 60.0
_MAX_LOGGED_REASONS = 7  # besides the first one
_MAX_CONSECUTIVE_FAILED_STARTS = 3


class RewardPool:
    """Scores responses in `num_workers` processes, which are started on first use and kept until `close`.

    A sample is marked as failed if its reward raises, returns no finite number, times out, or kills its process twice.
    Other samples are not affected. The processes end with the pool and with the process that owns it, however it ends.
    Jobs from several threads run one after another.

    Args:
        spec: spec of the reward, which is built once per process.
        num_workers: number of worker processes.
        timeout_s: seconds per sample, by the clock. A process that takes longer is killed and replaced. A batch of n
            samples may take n times as long; if it takes longer, each of its samples is scored again alone.
        key: key path of the reward's block, for errors and warnings.
        start_timeout_s: seconds to import and build the reward.
        max_batch: maximum number of requests sent to a process at once, and so of a `BatchReward` call.
        max_memory_mb: MiB that a process may allocate; None for no limit.
    """

    def __init__(
        self,
        spec: RewardSpec,
        num_workers: int,
        timeout_s: float,
        key: str,
        start_timeout_s: float = 120.0,
        max_batch: int = 32,
        max_memory_mb: int | None = None,
    ) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise RewardError(
                f"{key}: num_workers ({num_workers}) and timeout_s ({timeout_s:g}) must be positive; raise them"
            )
        self._spec = spec
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._key = key
        self._start_timeout_s = start_timeout_s
        self._max_batch = max_batch
        self._max_memory_mb = max_memory_mb
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._closed = False
        self._has_started = False
        self._failed_starts = 0
        self._mark = uuid.uuid4().hex
        self._output = WorkerOutput(key)
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the current workers; each is also the id of a process group."""
        return [worker.pid for worker in self._workers]

    def check(self) -> None:
        """Start all processes and wait until their rewards are built, so that errors appear before training.

        Raises:
            ConfigError, MissingDependencyError: the target or the arguments of the reward are wrong.
            RewardError: the reward cannot be built, its process died, or it was not ready in time.
        """
        with self._lock, self._killing_on_error():
            self._start_up_to(self._num_workers)
            while not all(worker.ready for worker in self._workers):
                for worker in self._wait(WorkerProcess.raise_start_timeout):
                    if worker.ready:  # a ready worker without requests sends nothing: it died
                        self._remove(worker)
                    else:
                        self._receive_ready(worker)

    def score(
        self, requests: Sequence[RewardRequest], progress: Callable[[int, int], None] | None = None
    ) -> list[RewardResult]:
        """Score requests and return their results in order.

        Args:
            requests: any number of requests.
            progress: function called with (number of finished samples, number of samples).

        Raises:
            ConfigError, MissingDependencyError, RewardError: a process cannot be started (see `check`).
        """
        job = self.new_job()
        for request in requests:
            job.submit(request)
        job.finish()
        return self.run(job, progress)

    def new_job(self) -> ScoringJob:
        """Return an empty job. One thread calls `run` with it, while other threads submit requests."""
        return ScoringJob(self._wake)

    def run(self, job: ScoringJob, progress: Callable[[int, int], None] | None = None) -> list[RewardResult]:
        """Score the requests of a job until it is done, and return the results in the order of `submit`.

        Raises:
            JobCancelled: the job was cancelled; the processes that were busy have been killed.
            ConfigError, MissingDependencyError, RewardError: see `score`.
        """
        with self._lock, self._killing_on_error():
            self._output.next_step()
            job.drain()
            while not job.done:
                self._start_up_to(min(self._num_workers, job.num_unfinished))
                self._assign_pending(job)
                for worker in self._wait(lambda late: self._handle_timeout(late, job)):
                    self._receive(worker, job)
                if progress is not None:
                    progress(len(job.results), len(job.requests))
                job.drain()
        results = job.ordered_results()
        self._log_failures(job.requests, results)
        return results

    def close(self) -> None:
        """Kill all processes. The pool cannot be used afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._kill_workers()
            kill_marked(self._mark)
            self._output.close()
            self._selector.close()
            self._wake_sender.close()
            self._wake_receiver.close()
        self._finalizer.detach()

    def _wake(self) -> None:
        # `send` fails if a wake-up is already pending (buffer full) or the pool is closed; both are fine.
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"!")

    def _start_up_to(self, num_workers: int) -> None:
        if self._closed:
            raise RewardError(f"{self._key}: the reward pool is closed; create a new one")
        while len(self._workers) < num_workers:
            worker = WorkerProcess(
                self._spec, self._key, self._start_timeout_s, self._max_memory_mb, self._output, self._mark
            )
            self._workers.append(worker)
            self._selector.register(worker, selectors.EVENT_READ, worker)

    def _assign_pending(self, job: ScoringJob) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if not job.pending:
                return
            chunks = self._num_workers if worker.scores_batches else _CHUNKS_PER_WORKER * self._num_workers
            taken = job.take(min(-(-len(job.pending) // chunks), self._max_batch))
            try:
                worker.assign(taken, [job.requests[i] for i in taken], self._timeout_s)
            except OSError:  # the worker died while idle, so no sample caused it
                job.requeue(taken)
                self._remove(worker)

    def _wait(self, on_timeout: Callable[[WorkerProcess], None]) -> list[WorkerProcess]:
        """Wait for messages and return the workers that sent one.

        `on_timeout` is called for each worker that sent none before its deadline. The result is empty if the pool was
        woken, or after `_MAX_WAIT_S`.
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

    def _handle_timeout(self, late: WorkerProcess, job: ScoringJob) -> None:
        if not late.ready:
            late.raise_start_timeout()
        if not self._isolate_batch(late, job):
            self._fail_current(late, job, f"timeout after {self._timeout_s:g} s")

    def _poll(self, timeout_s: float) -> list[WorkerProcess]:
        readable = [key.data for key, _ in self._selector.select(timeout_s)]
        if None in readable:
            self._wake_receiver.recv(4096)
        return [worker for worker in readable if worker is not None]

    def _receive(self, worker: WorkerProcess, job: ScoringJob) -> None:
        if not worker.ready:
            self._receive_ready(worker)
        elif worker.idle:  # an idle worker sends nothing: it died
            self._remove(worker)
        else:
            start = worker.busy_since
            try:
                for index, result in worker.receive_results(self._timeout_s):
                    job.results[index] = result
                    job.busy_spans.append((start, worker.busy_since))
                    start = worker.busy_since
            except (EOFError, OSError):
                self._handle_crash(worker, job)
            else:
                if worker.assigned and time.monotonic() >= worker.deadline:  # it sent a part of a message
                    self._handle_timeout(worker, job)

    def _receive_ready(self, worker: WorkerProcess) -> None:
        """Receive the ready message.

        Once a worker has started, a later one that dies during its start (e.g. out of memory) is replaced.
        """
        try:
            worker.receive_ready()
        except WorkerStartError as error:
            self._failed_starts += 1
            if not self._has_started or self._failed_starts > _MAX_CONSECUTIVE_FAILED_STARTS:
                raise
            logger.warning("%s; starting another worker", error)
            self._remove(worker)
        else:
            self._has_started, self._failed_starts = True, 0

    def _handle_crash(self, worker: WorkerProcess, job: ScoringJob) -> None:
        """Retry the current sample of a dead worker once, because something else may have killed the process."""
        if self._isolate_batch(worker, job):
            return
        current = worker.assigned[0]
        if current in job.crashed:
            self._fail_current(worker, job)
            return
        job.crashed.add(current)
        self._stop_busy(worker, job)
        job.requeue(worker.assigned)

    def _isolate_batch(self, worker: WorkerProcess, job: ScoringJob) -> bool:
        """Requeue each sample of a failed batch to be scored alone; return False if the worker had no batch."""
        if not worker.scores_batches or len(worker.assigned) < 2:
            return False
        self._stop_busy(worker, job)
        job.isolated.update(worker.assigned)
        job.requeue(worker.assigned)
        return True

    def _fail_current(self, worker: WorkerProcess, job: ScoringJob, reason: str | None = None) -> None:
        """Mark the worker's current sample as failed (default reason: the worker died) and requeue its others."""
        exit_reason = self._stop_busy(worker, job)
        current, *others = worker.assigned
        job.results[current] = RewardResult(0.0, reason or f"its worker process {exit_reason}")
        job.requeue(others)

    def _stop_busy(self, worker: WorkerProcess, job: ScoringJob) -> str:
        job.busy_spans.append((worker.busy_since, time.monotonic()))
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
        """Kill all workers on an exception or Ctrl-C, so that none still answers the interrupted call."""
        try:
            yield
        except BaseException:
            self._kill_workers()
            raise

    def _log_failures(self, requests: Sequence[RewardRequest], results: Sequence[RewardResult]) -> None:
        failures = [(r, request) for r, request in zip(results, requests, strict=True) if r.failed]
        if failures:
            first, request = failures[0]
            others = Counter(result.failed for result, _ in failures if result.failed != first.failed)
            listed = "".join(f"; {count} times: {reason}" for reason, count in others.most_common(_MAX_LOGGED_REASONS))
            logger.warning(
                "%s: %d of %d samples failed, first (row %s): %s%s",
                *(self._key, len(failures), len(results), request.row.get("id", "?"), first.failed, listed),
            )


def _kill_all(workers: list[WorkerProcess], owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork of the owner must not kill the owner's workers
        for worker in workers:
            worker.kill()
