"""A pool of worker processes that compute one reward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from roll_gspo.errors import RewardError
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.job import JobQueue, ScoringJob
from roll_gspo.rewards.process import WorkerProcess
from roll_gspo.rewards.spec import RewardSpec
from roll_gspo.rewards.worker_set import WorkerSet

_CHUNKS_PER_WORKER = 4  # small messages, so that all workers finish at about the same time
_NAP_S = 0.1


class RewardPool:
    """Scores responses in `num_workers` processes, which are started on first use and kept until `close`.

    A sample is marked as failed if its reward raises, returns no finite number, times out, or kills its process twice.
    Other samples are not affected. The processes end with the pool and with the process that owns it, however it ends.

    Several jobs may be open at once, also in different threads. Jobs with pending requests take turns, so that each
    gets the same number of samples scored. One thread runs all jobs; it exists while a job is open.

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
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._key = key
        self._max_batch = max_batch
        self._workers = WorkerSet(spec, key, start_timeout_s, max_memory_mb)
        self._num_served = 0  # of the job that was served last, before it was served
        self._lock = threading.Lock()  # guards the attributes below
        self._jobs: list[ScoringJob] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the current workers; each is also the id of a process group."""
        return self._workers.pids

    def check(self) -> None:
        """Start all processes and wait until their rewards are built, so that errors appear before training.

        Raises:
            ConfigError, MissingDependencyError: the target or the arguments of the reward are wrong.
            RewardError: the reward cannot be built, its process died, or it was not ready in time.
        """
        with self._add(ScoringJob(self._key, self._workers.wake, threading.Condition(), starts_workers=True)) as job:
            job.finish()
            job.ended.wait()
            job.raise_failure()

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
        with self.open() as job:
            for index, request in enumerate(requests):
                job.submit(index, request)
            job.finish()
            while not job.ended.wait(_NAP_S):
                if progress is not None:
                    progress(job.num_scored, len(requests))
            job.raise_failure()
            if progress is not None:
                progress(job.num_scored, len(requests))
            return [result for _, result in sorted(job.take(), key=lambda keyed: keyed[0])]

    def open(self, changed: threading.Condition | None = None) -> ScoringJob:
        """Return a new job, whose requests are scored until it ends. Use it as a context manager.

        Args:
            changed: notified when results of the job arrive and when it ends.

        Raises:
            RewardError: the pool is closed.
        """
        self.next_step()
        return self._add(ScoringJob(self._key, self._workers.wake, changed or threading.Condition()))

    def next_step(self) -> None:
        """Restart the limits of printed output, which hold per step."""
        self._workers.next_step()

    def close(self) -> None:
        """Kill all processes and end all jobs. The pool cannot be used afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._workers.wake()
            thread.join()
        self._workers.close()

    def _add(self, job: ScoringJob) -> ScoringJob:
        with self._lock:
            self._raise_if_closed()
            self._jobs.append(job)
            if self._thread is None:
                # Daemon thread: an interpreter that exits while a job is open must not wait for it.
                self._thread = threading.Thread(target=self._run, name=f"score {self._key}", daemon=True)
                self._thread.start()
        self._workers.wake()
        return job

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RewardError(f"{self._key}: the reward pool is closed; create a new one")

    def _run(self) -> None:
        """Score the requests of all jobs until no job is left; the thread's target."""
        while True:
            with self._lock:
                jobs = list(self._jobs)
                if not jobs:
                    self._thread = None
                    return
            try:
                self._raise_if_closed()
                self._score(jobs)
            except BaseException as error:
                # No worker may still answer a request of these jobs.
                self._workers.kill()
                for job in jobs:
                    if not job.ended.is_set():
                        self._end(job, error)

    def _score(self, jobs: Sequence[ScoringJob]) -> None:
        """Assign requests to idle workers, then wait once for messages of workers."""
        queues = [job.queue for job in jobs if self._is_open(job)]
        if not queues:
            return
        self._workers.start_up_to(min(self._num_workers, sum(queue.num_unfinished for queue in queues)))
        self._assign_pending(queues)
        for worker in self._workers.wait(self._handle_timeout):
            self._receive(worker)
        for queue in queues:
            queue.publish()

    def _is_open(self, job: ScoringJob) -> bool:
        """Drain a job. End it and return False if it is complete or was cancelled."""
        if job.cancelled:
            for worker in self._workers.busy:
                if worker.assigned[0].job is job:
                    self._workers.remove(worker)
        elif job.starts_workers:
            job.starts_workers = False
            self._workers.start_up_to(self._num_workers)
            job.awaits_workers = True
            return True
        else:
            job.queue.drain(self._num_served)
            if not job.complete or (job.awaits_workers and not self._workers.all_ready):
                return True
        self._end(job, None)
        return False

    def _end(self, job: ScoringJob, error: BaseException | None) -> None:
        with self._lock:
            self._jobs.remove(job)
        job.end(error)

    def _assign_pending(self, queues: Sequence[JobQueue]) -> None:
        for worker in self._workers.idle:
            waiting = [queue for queue in queues if queue.pending]
            if not waiting:
                return
            queue = min(waiting, key=lambda queue: queue.num_served)
            self._num_served = queue.num_served
            chunks = self._num_workers if worker.scores_batches else _CHUNKS_PER_WORKER * self._num_workers
            taken = queue.take(min(-(-len(queue.pending) // chunks), self._max_batch))
            try:
                worker.assign(taken, self._timeout_s)
            except OSError:  # the worker died while idle, so no sample caused it
                queue.requeue(taken)
                self._workers.remove(worker)

    def _handle_timeout(self, late: WorkerProcess) -> None:
        if not late.ready:
            late.raise_start_timeout()
        if not self._isolate_batch(late):
            self._fail_current(late, f"timeout after {self._timeout_s:g} s")

    def _receive(self, worker: WorkerProcess) -> None:
        if not worker.ready:
            self._workers.receive_ready(worker)
        elif worker.idle:  # an idle worker sends nothing: it died
            self._workers.remove(worker)
        else:
            start = worker.busy_since
            try:
                for sample, result in worker.receive_results(self._timeout_s):
                    sample.job.queue.add_result(sample, result)
                    sample.job.queue.add_span(start, worker.busy_since)
                    start = worker.busy_since
            except (EOFError, OSError):
                self._handle_crash(worker)
            else:
                if worker.assigned and time.monotonic() >= worker.deadline:  # it sent a part of a message
                    self._handle_timeout(worker)

    def _handle_crash(self, worker: WorkerProcess) -> None:
        """Retry the current sample of a dead worker once, because something else may have killed the process."""
        if not worker.assigned:  # it sent more results than it got requests
            self._workers.remove(worker)
            return
        if self._isolate_batch(worker):
            return
        current = worker.assigned[0]
        if current.crashed:
            self._fail_current(worker)
            return
        current.crashed = True
        self._stop_busy(worker)
        current.job.queue.requeue(worker.assigned)

    def _isolate_batch(self, worker: WorkerProcess) -> bool:
        """Requeue each sample of a failed batch to be scored alone; return False if the worker had no batch."""
        if not worker.scores_batches or len(worker.assigned) < 2:
            return False
        self._stop_busy(worker)
        for sample in worker.assigned:
            sample.isolated = True
        worker.assigned[0].job.queue.requeue(worker.assigned)
        return True

    def _fail_current(self, worker: WorkerProcess, reason: str | None = None) -> None:
        """Mark the worker's current sample as failed (default reason: the worker died) and requeue its others."""
        exit_reason = self._stop_busy(worker)
        current, *others = worker.assigned
        queue = current.job.queue
        queue.add_result(current, RewardResult(0.0, reason or f"its worker process {exit_reason}"))
        queue.requeue(others)

    def _stop_busy(self, worker: WorkerProcess) -> str:
        worker.assigned[0].job.queue.add_span(worker.busy_since, time.monotonic())
        return self._workers.remove(worker)
