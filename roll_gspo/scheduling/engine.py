"""A simulated generation engine. All running requests share it: each decode step adds one token to every request."""

from __future__ import annotations

import heapq
from collections.abc import Container
from dataclasses import dataclass, field

_TOLERANCE = 1e-6  # tokens; rounding of the progress


@dataclass(order=True, slots=True)
class Request:
    """A response that an engine samples.

    Attributes:
        end: progress of its engine at which the response is complete.
        group: number of its group.
        length: tokens of the response.
        engine: the engine that samples it.
        start: progress of the engine at admission.
        version: weights version at admission.
    """

    end: float = field(init=False, default=0.0)
    group: int
    length: int
    engine: int = field(compare=False, default=-1)
    start: float = field(compare=False, default=0.0)
    version: int = field(compare=False, default=0)


class DecodeEngine:
    """Decode the running requests of an engine.

    With r running requests, a decode step takes `step_s + r * step_s_per_request` seconds. The state changes only if a
    request is admitted, completed or aborted, so that the tokens in between need no events. Progress counts the decode
    steps of the engine: a request admitted at progress p is complete at p + length.
    """

    def __init__(self, step_s: float, step_s_per_request: float) -> None:
        self._step_s, self._step_s_per_request = step_s, step_s_per_request
        self._running: list[Request] = []  # heap by `end`
        self._progress = 0.0
        self._time = 0.0
        self._version_starts = [0.0]  # progress at which each version began
        self.is_paused = False
        self.busy_s = 0.0
        """Seconds in which at least one request was decoded."""
        self.request_s = 0.0
        """Seconds of decoding, summed over requests."""

    def advance(self, time: float) -> None:
        """Decode until `time`."""
        seconds, self._time = time - self._time, time
        if self._running and not self.is_paused:
            self._progress += seconds / self._seconds_per_token()
            self.busy_s += seconds
            self.request_s += seconds * len(self._running)

    def admit(self, request: Request) -> None:
        """Start a request now."""
        request.start, request.end = self._progress, self._progress + request.length
        request.version = len(self._version_starts) - 1
        heapq.heappush(self._running, request)

    def next_end(self) -> float | None:
        """Return the time of the next completion; None if nothing is decoded."""
        if not self._running or self.is_paused:
            return None
        return self._time + max(0.0, self._running[0].end - self._progress) * self._seconds_per_token()

    def pop_complete(self) -> list[Request]:
        """Remove and return the requests that are complete now."""
        complete = []
        while self._running and self._running[0].end <= self._progress + _TOLERANCE:
            complete.append(heapq.heappop(self._running))
        return complete

    def abort(self, groups: Container[int]) -> list[tuple[Request, float]]:
        """Remove the requests of groups; return each with the tokens that it has sampled."""
        aborted = [request for request in self._running if request.group in groups]
        self._running = [request for request in self._running if request.group not in groups]
        heapq.heapify(self._running)
        return [(request, self._progress - request.start) for request in aborted]

    def update_weights(self) -> None:
        """Continue with the next version of the weights."""
        self._version_starts.append(self._progress)

    def tokens_by_version(self, request: Request) -> list[tuple[int, float]]:
        """Return (version, tokens) of a complete request."""
        starts = self._version_starts
        if request.version == len(starts) - 1:
            return [(request.version, request.length)]
        limits = [request.start, *starts[request.version + 1 :], request.end]
        return [(request.version + i, limits[i + 1] - limits[i]) for i in range(len(limits) - 1)]

    def _seconds_per_token(self) -> float:
        return self._step_s + self._step_s_per_request * len(self._running)
