"""Requests to engines in other processes.

A worker runs its calls in order. The stream keeps two calls of `Replica.advance` in flight per worker, so that an
engine computes while the controller handles its last reply. Requests, aborts and weights are calls between them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from roll_gspo.batch import Completion
from roll_gspo.errors import RollGspoError, WorkerDiedError, WorkerHungError
from roll_gspo.execution.base import Pending, WorkerGroup
from roll_gspo.roles.replica import Advanced
from roll_gspo.roles.request_stream import SLICE_S, Lane, Outstanding, RequestStream
from roll_gspo.strategies.base import FinishedRequest

logger = logging.getLogger(__name__)
_IN_FLIGHT = 2
_REPORT_INTERVAL_S = 2.0
_REPLICAS_PER_SLICE = 16  # more replicas get longer slices, so that the controller handles 320 replies per second
_LOST = (WorkerDiedError, WorkerHungError)


@dataclass(frozen=True)
class _Call:
    """An unanswered call of a worker: an advance, submitted requests, or an abort whose result is ignored."""

    pending: Pending
    advances: bool = False
    items: tuple[Outstanding, ...] = ()


class _Replica(Lane):
    """The requests and the calls of one worker, in the order of the calls."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.calls: deque[_Call] = deque()
        self.reported_at = 0.0

    @property
    def num_advances(self) -> int:
        return sum(call.advances for call in self.calls)


class ReplicaStream(RequestStream):
    """`RequestStream` over a worker group of `Replica`.

    Requests of a lost worker go to the others. They start again with the same seed, which gives the same result. With
    `continue_lost` they continue after the tokens that the worker reported last.

    Args:
        group: independent workers.
        restore: restarts lost workers and sends them weights; returns False if that is impossible in this thread.
        continue_lost: workers report their unfinished responses every two seconds.
    """

    def __init__(self, group: WorkerGroup, restore: Callable[[], bool], continue_lost: bool = False) -> None:
        super().__init__(group.name)
        self.continue_lost = continue_lost
        self._group = group
        self._restore = restore
        self._replicas = [_Replica(rank) for rank in range(group.size)]
        self._slice_s = SLICE_S * max(1.0, group.size / _REPLICAS_PER_SLICE)

    def forget(self, rank: int) -> None:
        """Queue the requests of a lost or restarted worker again."""
        replica = self._replicas[rank]
        replica.calls.clear()
        replica.capacity = None
        if count := self._requeue(replica):
            how = "continued" if self.continue_lost else "redone"
            logger.warning("%s: rank %d: its %d requests are %s", self._group.name, rank, count, how)

    def check_alive(self) -> None:
        """Check that a worker is left.

        Raises:
            WorkerDiedError: every worker was lost.
        """
        if not self._living():
            raise WorkerDiedError(
                f"{self._group.name}: every worker was lost while its weights were older than the trainer's, which "
                "cannot be sent again"
            )

    def _work(self, timeout_s: float) -> None:
        self._drain(0.0)
        living = self._living()
        if len(living) < len(self._replicas):
            if self._restore():
                living = self._living()
            elif not living:
                time.sleep(timeout_s)
                return
        self._ask_capacities(living)
        self._feed(living)
        for replica in living:
            self._keep_advancing(replica)
        self._drain(timeout_s)

    def _living(self) -> list[_Replica]:
        return [replica for replica in self._replicas if self._group.alive(replica.rank)]

    def _ask_capacities(self, replicas: Sequence[_Replica]) -> None:
        new = [replica for replica in replicas if replica.capacity is None]
        for replica, capacity in self._collect("capacity", [(replica, ()) for replica in new]):
            replica.capacity = capacity

    def _keep_advancing(self, replica: _Replica) -> None:
        while replica.held and replica.num_advances < _IN_FLIGHT:
            now = time.monotonic()
            report = self.continue_lost and now - replica.reported_at >= _REPORT_INTERVAL_S
            if report:
                replica.reported_at = now
            if not self._submit(replica, "advance", self._slice_s, report, advances=True):
                return

    def _submit(
        self,
        replica: _Replica,
        method: str,
        *args: object,
        advances: bool = False,
        items: Sequence[Outstanding] = (),
    ) -> bool:
        """Start a call; return False if the worker is dead."""
        try:
            pending = self._group.submit(method, *args, rank=replica.rank)
        except _LOST as error:
            self._lost(replica, error)
            return False
        replica.calls.append(_Call(pending, advances, tuple(items)))
        return True

    def _send(self, lane: Lane, items: Sequence[Outstanding]) -> None:
        assert isinstance(lane, _Replica)
        self._submit(lane, "submit", [item.request for item in items], items=items)

    def _drain(self, timeout_s: float) -> None:
        """Wait until a worker answered, at most `timeout_s`, and handle all answers."""
        heads = {replica.calls[0].pending: replica for replica in self._replicas if replica.calls}
        if not heads:
            return
        for pending in self._group.wait(list(heads), timeout_s):
            replica = heads[pending]
            while replica.calls and replica.calls[0].pending.done():
                self._take(replica, replica.calls.popleft())

    def _take(self, replica: _Replica, call: _Call) -> None:
        try:
            answer = call.pending.result()
        except _LOST as error:
            self._lost(replica, error)
        except RollGspoError as error:
            if call.items:
                self._reject(replica, call.items, error)
            else:
                held = list(replica.held)
                self._fail(replica, error)
                if held:
                    self._submit(replica, "abort", held)
        else:
            if isinstance(answer, Advanced):
                self._report(replica, answer.news)
                self._deliver(replica, answer.finished)

    def _report(self, replica: _Replica, news: Sequence[FinishedRequest]) -> None:
        for number, tail in news:
            if (item := replica.held.get(number)) is not None:
                item.reported = _joined(item.reported or item.request.partial, tail)

    def _lost(self, replica: _Replica, error: Exception) -> None:
        logger.warning("%s", error)
        self.forget(replica.rank)

    def _settle(self) -> None:
        while any(replica.calls for replica in self._replicas):
            self._drain(0.25)

    def _collect(
        self, method: str, arguments: Sequence[tuple[_Replica, tuple[object, ...]]]
    ) -> list[tuple[_Replica, Any]]:
        """Call a method of idle workers; return (replica, result) of those that are not lost meanwhile."""
        calls: list[tuple[_Replica, Pending]] = []
        results: list[tuple[_Replica, Any]] = []
        for replica, args in arguments:
            try:
                calls.append((replica, self._group.submit(method, *args, rank=replica.rank)))
            except _LOST as error:
                self._lost(replica, error)
        for replica, pending in calls:
            try:
                results.append((replica, pending.result()))
            except _LOST as error:
                self._lost(replica, error)
        return results

    def _removed(self, numbers: Sequence[int]) -> list[tuple[_Replica, tuple[list[int]]]]:
        """Remove requests from their lanes; return the numbers of each engine that held some."""
        by_replica = [(replica, [n for n in numbers if replica.remove(n)]) for replica in self._replicas]
        return [(replica, (held,)) for replica, held in by_replica if held]

    def _abort(self, numbers: Sequence[int]) -> list[FinishedRequest]:
        return [each for _, found in self._collect("abort", self._removed(numbers)) for each in found]

    def _partials(self) -> list[FinishedRequest]:
        holding = [(replica, ()) for replica in self._replicas if replica.held]
        return [each for _, found in self._collect("partials", holding) for each in found]

    def _discard(self, numbers: Sequence[int]) -> None:
        for replica, (held,) in self._removed(numbers):
            self._submit(replica, "abort", held)


def _joined(known: Completion | None, tail: Completion) -> Completion:
    if known is None:
        return tail
    return replace(tail, token_ids=known.token_ids + tail.token_ids, log_probs=known.log_probs + tail.log_probs)
