"""Generation on several engines, each in a separate process, behind the interface of one.

A sample depends on its prompt, its seed and the weights only, so how prompts are dealt out changes nothing; and what a
lost engine was asked is asked of another one.
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
_CHUNKS_PER_REPLICA = 4  # fewer let the others wait for the slowest, more decode too few samples together
_SAMPLES_PER_CHUNK = 64  # at least, where that leaves work for everybody
_IN_FLIGHT = 2  # chunks of one replica, so that the next one is there when one ends


class _Engine(GenerateStrategy, WeightReceiver, Protocol):
    """The engine of a replica: generates and receives weights."""


class Replica(ProfiledRole):
    """One engine, in the process that it has for itself."""

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
        """Answered by a process that lives."""

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
        max_restarts: workers that may be lost in the whole run.
    """

    def __init__(self, group: WorkerGroup, max_restarts: int) -> None:
        self.group = group
        self.restore_weights: Callable[[], None] = lambda: None  # set by who transfers weights
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
        """Generate responses. The least busy replica gets the next prompts; samples finish chunk by chunk.

        Raises:
            WorkerDiedError, WorkerHungError: more workers were lost than may be.
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
        """Let every replica record traces, as the rank that it has in the group."""
        for rank in range(self.group.size):
            self.group.call("profile", target and replace(target, rank=rank), rank=rank)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Raise an error: weights of engines in other processes are sent by `BroadcastSync`."""
        raise WeightTransferError(
            f"{self.group.name}: weights of version {version} must be sent by BroadcastSync.push; engines in "
            "other processes cannot read them here"
        )

    def revive(self, every: bool = False) -> bool:
        """Start the lost workers again (or all, if one was lost); whether there were any. They have no weights yet.

        Raises:
            WorkerDiedError: more were lost than may be.
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
        """Who gets the next chunk; None while all have enough, or while the group waits for a lost one."""
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
    """Asks for progress; who waits reads it from the pending call."""
