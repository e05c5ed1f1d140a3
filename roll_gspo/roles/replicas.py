"""Generation on several engines in separate processes, with the interface of a single engine.

A sample depends only on its prompt, its seed and the weights. The assignment of samples to engines therefore changes no
result, and samples of a lost engine are repeated on another one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from roll_gspo.batch import Completion
from roll_gspo.errors import WeightTransferError, WorkerDiedError
from roll_gspo.execution.base import Progress, WorkerGroup
from roll_gspo.roles.replica_stream import ReplicaStream
from roll_gspo.strategies.base import GenerationRequest, SampleFinished, Sampling, WeightSource
from roll_gspo.strategies.residency import Residency
from roll_gspo.tracking.profiler import TraceTarget

logger = logging.getLogger(__name__)
_POLL_S = 0.25


class Replicas:
    """`GenerateStrategy` over a worker group of `Replica`.

    Lost workers are restarted in the thread that built this object, because that needs the trainer. Clients
    that poll in other threads use the remaining workers meanwhile.

    Args:
        group: independent workers.
        max_restarts: maximum number of lost workers in the whole run; None if no worker can be started again, because
            the engines share their devices with roles that are in memory then.
        continue_lost: continue the responses of a lost worker after the tokens that it reported, instead of sampling
            them again. The samples then depend on when the worker was lost.
    """

    def __init__(self, group: WorkerGroup, max_restarts: int | None, continue_lost: bool = False) -> None:
        self.group = group
        self.stream = ReplicaStream(group, self._restore, continue_lost)
        self.restore_weights: Callable[[], None] = lambda: None  # set by the weight sync
        self._max_restarts = max_restarts
        self._restarts = 0
        self._thread = threading.get_ident()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Progress | None = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        """Generate responses. They go before the waiting requests of other clients of `stream`.

        Raises:
            WorkerDiedError, WorkerHungError: more than `max_restarts` workers were lost.
        """
        size = sampling.num_samples
        done: dict[int, Completion] = {}
        client = self.stream.open(urgent=True)
        try:
            client.submit(
                [
                    GenerationRequest(number * size + sample, tokens, sampling, seed + sample)
                    for number, (tokens, seed) in enumerate(zip(map(tuple, prompts), seeds, strict=True))
                    for sample in range(size)
                ]
            )
            while client.outstanding:
                for key, completion in client.poll(_POLL_S):
                    done[key] = completion
                    if finished is not None:
                        finished(*divmod(key, size), completion)
                if progress is not None:
                    progress(len(done), len(prompts) * size)
        finally:
            client.close()
        return [[done[number * size + sample] for sample in range(size)] for number in range(len(prompts))]

    def profile(self, target: TraceTarget | None) -> None:
        """Set the trace target of every replica, with the replica's rank."""
        with self.stream.paused():
            for rank in range(self.group.size):
                self.group.call("profile", target and replace(target, rank=rank), rank=rank)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Raise an error: `BroadcastSync` sends the weights to engines in other processes."""
        raise WeightTransferError(
            f"{self.group.name}: weights of version {version} must be sent by BroadcastSync.push; engines in "
            "other processes cannot read them here"
        )

    def reside(self, residency: Residency) -> None:
        """Move the state of every engine. Outstanding requests wait meanwhile."""
        with self.stream.paused():
            self.group.call("reside", residency)

    def device_memory(self) -> int | None:
        """Return the bytes in use on the first device of rank 0; None without a GPU."""
        with self.stream.paused():
            return self.group.call("device_memory", rank=0)

    def revive(self, every: bool = False) -> bool:
        """Restart lost workers, or all workers if one was lost and `every` is set.

        Restarted workers have no weights yet. Their requests wait for a free replica.

        Returns:
            Whether any worker was lost.

        Raises:
            WorkerDiedError: more than `max_restarts` workers were lost.
        """
        lost = [rank for rank in range(self.group.size) if not self.group.alive(rank)]
        if lost and self._max_restarts is None:
            raise WorkerDiedError(
                f"{self.group.name}: rank {lost[0]} was lost, and engines that share devices with other roles are not "
                "started again; look for the cause in run.log; with max_restarts=1 the run resumes by itself"
            )
        self._restarts += len(lost)
        if self._max_restarts is not None and self._restarts > self._max_restarts:
            raise WorkerDiedError(
                f"{self.group.name}: {self._restarts} worker(s) were lost in this run, more than max_worker_restarts "
                f"{self._max_restarts}; look for the cause in run.log, or raise it"
            )
        for rank in range(self.group.size) if every and lost else lost:
            logger.warning("%s: starting rank %d again", self.group.name, rank)
            self.stream.forget(rank)
            self.group.restart(rank)
        return bool(lost)

    def shutdown(self) -> None:
        """Close all replicas."""
        self.group.close()

    def _restore(self) -> bool:
        if threading.get_ident() != self._thread:
            return False
        with self.stream.paused():
            self.revive()
            self.restore_weights()
        return True
