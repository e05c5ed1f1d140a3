"""Requests to one engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from roll_gspo.errors import RollGspoError
from roll_gspo.roles.request_stream import SLICE_S, Lane, Outstanding, RequestStream
from roll_gspo.strategies.base import FinishedRequest
from roll_gspo.strategies.batch_streaming import RequestEngine


class LocalStream(RequestStream):
    """`RequestStream` over one engine in this process.

    Args:
        engine: the engine; it decodes in the thread that polls.
        name: name of the role, for messages.
    """

    def __init__(self, engine: RequestEngine, name: str = "actor_infer") -> None:
        super().__init__(name)
        self._engine = engine
        self._lane = Lane()

    def check_alive(self) -> None:
        """Do nothing: this process holds the engine."""

    def _work(self, timeout_s: float) -> None:
        self._lane.capacity = sys.maxsize  # a single engine: requests wait there, not here
        self._feed([self._lane])
        try:
            finished = self._engine.advance(min(timeout_s, SLICE_S))
        except Exception as error:
            held = list(self._lane.held)
            self._fail(self._lane, error)
            self._engine.abort(held)
        else:
            self._deliver(self._lane, finished)

    def _send(self, lane: Lane, items: Sequence[Outstanding]) -> None:
        try:
            self._engine.submit([item.request for item in items])
        except RollGspoError as error:
            self._reject(lane, items, error)

    def _settle(self) -> None:
        pass

    def _abort(self, numbers: Sequence[int]) -> list[FinishedRequest]:
        held = [number for number in numbers if self._lane.remove(number)]
        return self._engine.abort(held) if held else []

    def _partials(self) -> list[FinishedRequest]:
        return self._engine.partials() if self._lane.held else []

    def _discard(self, numbers: Sequence[int]) -> None:
        self._abort(numbers)
