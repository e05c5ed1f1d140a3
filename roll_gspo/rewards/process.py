"""Handle of one worker process of a reward, used by the pool."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from roll_gspo.rewards.base import RewardResult
from roll_gspo.rewards.job import Sample
from roll_gspo.workers.output import WorkerOutput
from roll_gspo.workers.process import ChildProcess, WorkerProgram


class WorkerProcess(ChildProcess):
    """A process that holds one built reward.

    Args:
        program, output, mark: see `ChildProcess`.

    Attributes:
        ready: True if the reward is built.
        scores_batches: True if the reward is a `BatchReward`.
        assigned: unanswered samples, all of one job. The worker scores the first one, or all of them as a batch.
        busy_since: start of the current work, in seconds of `time.monotonic()`.
    """

    def __init__(self, program: WorkerProgram, output: WorkerOutput, mark: str) -> None:
        self.scores_batches = False
        self.busy_since = 0.0
        self.assigned: deque[Sample] = deque()
        super().__init__(program, output, mark)

    @property
    def idle(self) -> bool:
        """True if the worker is ready and has no requests."""
        return self.ready and not self.assigned

    def assign(self, samples: Sequence[Sample], timeout_s: float) -> None:
        """Send requests to the worker.

        Args:
            samples: samples of one job.
            timeout_s: seconds per sample; a batch of n samples has n times as long.

        Raises:
            OSError: the process died, or did not read the requests within 30 s.
        """
        self.assigned = deque(samples)
        self._start_clock(timeout_s)
        self.send((timeout_s, [sample.request for sample in samples]))

    def receive_ready(self) -> None:
        """Receive the message that the reward is built. Does nothing if only a part of it has arrived.

        Raises:
            ConfigError, MissingDependencyError, RewardError: the reward cannot be built.
            WorkerStartError: the process died.
        """
        answer = self.receive_start()
        if answer is not None:
            self.scores_batches = answer["batch"]

    def receive_results(self, timeout_s: float) -> Iterator[tuple[Sample, RewardResult]]:
        """Yield the samples and results that have arrived, in the order of the requests. Each restarts the clock.

        Raises:
            EOFError, OSError: the process died, or sent something else.
        """
        for answer in self.receive():
            try:
                result, sample = RewardResult(**answer), self.assigned.popleft()
            except (TypeError, IndexError):
                raise EOFError("the process sent no result") from None
            self._start_clock(timeout_s)
            yield sample, result

    def _start_clock(self, timeout_s: float) -> None:
        self.busy_since = time.monotonic()
        self.deadline = self.busy_since + timeout_s * (len(self.assigned) if self.scores_batches else 1)
