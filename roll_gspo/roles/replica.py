"""One of several generation engines, in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from roll_gspo.roles.profiled import ProfiledRole
from roll_gspo.roles.shared_devices import ResidentRole
from roll_gspo.strategies.base import (
    FinishedRequest,
    GenerateStrategy,
    GenerationRequest,
    WeightReceiver,
)
from roll_gspo.strategies.batch_streaming import streaming
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.tracking.profiler import TraceTarget, record_trace


class _Engine(GenerateStrategy, WeightReceiver, Protocol):
    """The engine of a replica: generates and receives weights."""


@dataclass(frozen=True)
class Advanced:
    """Result of `Replica.advance`.

    Attributes:
        finished: responses that ended.
        news: tokens of unfinished responses that were not reported before. `version_runs` are those of the whole
            response. Empty unless requested.
    """

    finished: list[FinishedRequest]
    news: list[FinishedRequest]


class Replica(ProfiledRole, ResidentRole):
    """The engine of one worker process. A trace covers the time from the first request until none is outstanding."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = self._strategy = engine
        self._requests = streaming(engine)
        self._reported: dict[int, int] = {}  # number of reported tokens of each outstanding request
        self._trace = ExitStack()
        self._tracing = False

    def capacity(self) -> int:
        """Return the number of requests that decode at the same time."""
        return self._requests.capacity

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests."""
        self._requests.submit(requests)
        for request in requests:
            self._reported[request.key] = len(request.partial.token_ids) if request.partial else 0

    def advance(self, seconds: float, report: bool = False) -> Advanced:
        """Decode for about `seconds`. With `report`, return the new tokens of unfinished responses as well."""
        if self._reported and not self._tracing and (path := self.next_trace("generate")) is not None:
            self._trace.enter_context(record_trace(path))
            self._tracing = True
        finished = self._requests.advance(seconds)
        for key, _ in finished:
            self._reported.pop(key, None)
        if not self._reported:
            self._end_trace()
        return Advanced(finished, self._news() if report else [])

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests and return what they have sampled."""
        for key in keys:
            self._reported.pop(key, None)
        return self._requests.abort(keys)

    def partials(self) -> list[FinishedRequest]:
        """Return what every outstanding request has sampled."""
        return self._requests.partials()

    def profile(self, target: TraceTarget | None) -> None:
        self._end_trace()
        super().profile(target)

    def ready(self) -> None:
        """Do nothing. A reply shows that the process is alive."""

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Join the weight transfer."""
        self._engine.connect(address)

    def receive_weights(self, version: int) -> None:
        """Receive the weights of `version`."""
        self._engine.receive(version)

    def close(self) -> None:
        """Free the engine."""
        self._end_trace()
        self._engine.shutdown()

    def _news(self) -> list[FinishedRequest]:
        news = []
        for key, completion in self._requests.partials():
            start, end = self._reported[key], len(completion.token_ids)
            if end > start:
                tail = completion.token_ids[start:], completion.log_probs[start:]
                news.append(
                    FinishedRequest(key, replace(completion, token_ids=tail[0], log_probs=tail[1], routed_experts=None))
                )
                self._reported[key] = end
        return news

    def _end_trace(self) -> None:
        self._trace.close()
        self._tracing = False
