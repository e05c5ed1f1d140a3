"""Generation on several engines in separate processes, with the interface of a single engine.

A sample depends only on its prompt, its seed and the weights. The assignment of prompts to engines therefore changes no
result, and prompts of a lost engine are repeated on another one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from roll_gspo.batch import Completion
from roll_gspo.errors import WeightTransferError, WorkerDiedError, WorkerHungError
from roll_gspo.execution.base import Pending, Progress, WorkerGroup, wait_first
from roll_gspo.roles.profiled import ProfiledRole, profiled
from roll_gspo.strategies.base import GenerateStrategy, SampleFinished, Sampling, WeightReceiver, WeightSource
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress
from roll_gspo.tracking.profiler import TraceTarget

logger = logging.getLogger(__name__)
_CHUNKS_PER_REPLICA = 4  # fewer: replicas wait for the slowest one; more: batches are too small to decode efficiently
_SAMPLES_PER_CHUNK = 64  # minimum, if every replica still gets a chunk
_IN_FLIGHT = 2  # chunks per replica, so that the next one is queued when one ends


class _Engine(GenerateStrategy, WeightReceiver, Protocol):
    """The engine of a replica: generates and receives weights."""


class Replica(ProfiledRole):
    """The engine of one worker process."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine

    @profiled
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> list[list[Completion]]:
        """Generate responses on this replica."""
        return self._engine.generate(prompts, sampling, seeds, progress)

    def ready(self) -> None:
        """Do nothing. A reply shows that the process is alive."""

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Join the weight broadcast."""
        self._engine.connect(address)

    def receive_weights(self, version: int) -> None:
        """Receive the weights of `version`."""
        self._engine.receive(version)

    def close(self) -> None:
        """Free the engine."""
        self._engine.shutdown()


@dataclass(frozen=True)
class _Chunk:
    """Prompts `start` to `end` of a call."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class Replicas:
    """`GenerateStrategy` over a worker group of `Replica`.

    Args:
        group: independent workers.
        max_restarts: maximum number of lost workers in the whole run.
    """

    def __init__(self, group: WorkerGroup, max_restarts: int) -> None:
        self.group = group
        self.restore_weights: Callable[[], None] = lambda: None  # set by the weight sync
        self._max_restarts = max_restarts
        self._restarts = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Progress | None = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        """Generate responses. The least busy replica gets the next prompts; samples are delivered chunk by chunk.

        Raises:
            WorkerDiedError, WorkerHungError: more than `max_restarts` workers were lost.
        """
        todo = deque(self._chunks(len(prompts), sampling.num_samples))
        running: dict[Pending, tuple[int, _Chunk]] = {}
        answers: dict[_Chunk, list[list[Completion]]] = {}
        while todo or running:
            if not self._complete() and not running:
                self.revive()
                self.restore_weights()
            while todo and (rank := self._least_busy(running)) is not None:
                chunk = todo.popleft()
                part = slice(chunk.start, chunk.end)
                pending = self.group.submit("generate", prompts[part], sampling, seeds[part], _progress, rank=rank)
                running[pending] = (rank, chunk)
            for pending in wait_first(list(running), timeout_s=0.25):
                rank, chunk = running.pop(pending)
                try:
                    answers[chunk] = pending.result()
                except (WorkerDiedError, WorkerHungError) as error:
                    todo.appendleft(chunk)
                    logger.warning("%s; its %d prompts are redone", error, len(chunk))
                    continue
                if finished is not None:
                    _hand_out(answers[chunk], chunk.start, finished)
            if progress is not None:
                done = sum(map(len, answers)) * sampling.num_samples + sum(p.progress[0] for p in running)
                progress(done, len(prompts) * sampling.num_samples)
        return [group for chunk in sorted(answers, key=lambda c: c.start) for group in answers[chunk]]

    def profile(self, target: TraceTarget | None) -> None:
        """Set the trace target of every replica, with the replica's rank."""
        for rank in range(self.group.size):
            self.group.call("profile", target and replace(target, rank=rank), rank=rank)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Raise an error: `BroadcastSync` sends the weights to engines in other processes."""
        raise WeightTransferError(
            f"{self.group.name}: weights of version {version} must be sent by BroadcastSync.push; engines in "
            "other processes cannot read them here"
        )

    def revive(self, every: bool = False) -> bool:
        """Restart lost workers, or all workers if one was lost and `every` is set.

        Restarted workers have no weights yet.

        Returns:
            Whether any worker was lost.

        Raises:
            WorkerDiedError: more than `max_restarts` workers were lost.
        """
        lost = [rank for rank in range(self.group.size) if not self.group.alive(rank)]
        self._restarts += len(lost)
        if self._restarts > self._max_restarts:
            raise WorkerDiedError(
                f"{self.group.name}: {self._restarts} worker(s) were lost in this run, more than max_worker_restarts "
                f"{self._max_restarts}; look for the cause in run.log, or raise it"
            )
        for rank in range(self.group.size) if every and lost else lost:
            logger.warning("%s: starting rank %d again", self.group.name, rank)
            self.group.restart(rank)
        return bool(lost)

    def shutdown(self) -> None:
        """Close all replicas."""
        self.group.close()

    def _complete(self) -> bool:
        return all(self.group.alive(rank) for rank in range(self.group.size))

    def _least_busy(self, running: dict[Pending, tuple[int, _Chunk]]) -> int | None:
        """Return the rank for the next chunk; None if all are busy enough or a worker is lost."""
        if not self._complete():
            return None
        load = [0] * self.group.size
        count = [0] * self.group.size
        for rank, chunk in running.values():
            load[rank] += len(chunk)
            count[rank] += 1
        free = [rank for rank in range(self.group.size) if count[rank] < _IN_FLIGHT]
        return min(free, key=lambda rank: load[rank], default=None)

    def _chunks(self, num_prompts: int, num_samples: int) -> list[_Chunk]:
        share = -(-num_prompts // self.group.size)
        size = max(-(-num_prompts // (self.group.size * _CHUNKS_PER_REPLICA)), -(-_SAMPLES_PER_CHUNK // num_samples))
        size = max(1, min(size, share))
        return [_Chunk(start, min(start + size, num_prompts)) for start in range(0, num_prompts, size)]


def _hand_out(groups: Sequence[Sequence[Completion]], first: int, finished: SampleFinished) -> None:
    for number, group in enumerate(groups, first):
        for sample, completion in enumerate(group):
            finished(number, sample, completion)


def _progress(done: int, total: int) -> None:
    """Request progress reports; the caller reads them from the pending call."""
