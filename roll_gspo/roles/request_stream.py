"""Requests to generation engines, from several threads at the same time.

A `RequestStream` owns one or more engines. Each `StreamClient` submits requests and polls for its own responses. The
engines compute only while a client polls, so a stream needs no thread.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from roll_gspo.batch import Completion
from roll_gspo.roles.fair_lock import FairLock
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest

SLICE_S = 0.05
"""Seconds that an engine decodes before it returns what has ended."""

_LOCK_TIMEOUT_S = 3600.0


@dataclass(eq=False)
class Outstanding:
    """A request whose response has not been delivered.

    Attributes:
        client: the client that submitted it.
        key: the client's key.
        request: the request as the engines see it; its key is unique in the stream.
        reported: tokens that an engine reported last; None if it has not.
    """

    client: StreamClient
    key: int
    request: GenerationRequest
    reported: Completion | None = None

    @property
    def budget(self) -> int:
        """Largest number of tokens that an engine computes for the request."""
        known = len(self.request.partial.token_ids) if self.request.partial else 0
        return len(self.request.prompt) + self.request.sampling.max_new_tokens - known


class Lane:
    """The requests that one engine holds.

    Attributes:
        capacity: number of requests that the engine decodes at the same time; None until the engine reported it.
        held: requests by their key in the stream.
        load: tokens that the engine may still compute.
        num_ended: requests that ended in the last slice.
    """

    def __init__(self) -> None:
        self.capacity: int | None = None
        self.held: dict[int, Outstanding] = {}
        self.load = 0
        self.num_ended = 0

    @property
    def room(self) -> int:
        """Number of further requests that the engine may hold.

        A few requests beyond `capacity` wait in the engine. They replace those that end before the next call.
        """
        if self.capacity is None:
            return 0
        return self.capacity + self.capacity // 4 + 2 * self.num_ended + 1 - len(self.held)

    def add(self, item: Outstanding) -> None:
        """Add a request."""
        self.held[item.request.key] = item
        self.load += item.budget

    def remove(self, number: int) -> Outstanding | None:
        """Remove a request, if the engine holds it."""
        item = self.held.pop(number, None)
        if item is not None:
            self.load -= item.budget
        return item


class StreamClient:
    """The requests of one caller. All methods may be called from any thread.

    Args:
        stream: the engines.
        urgent: waiting requests go before those of other clients.
    """

    def __init__(self, stream: RequestStream, urgent: bool = False) -> None:
        self._stream = stream
        self.urgent = urgent
        self._numbers: dict[int, int] = {}
        self._finished: list[FinishedRequest] = []
        self._error: Exception | None = None
        self._news = threading.Event()

    @property
    def outstanding(self) -> int:
        """Number of requests whose response `poll` has not returned."""
        return len(self._numbers) + len(self._finished)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests. Their keys must differ from those of this client's outstanding requests."""
        with self._stream.lock.held():
            for request in requests:
                if request.key in self._numbers:
                    raise ValueError(f"request {request.key} is outstanding already; give every request another key")
                self._numbers[request.key] = self._stream.enqueue(self, request)
        self._news.set()

    def poll(self, timeout_s: float) -> list[FinishedRequest]:
        """Let the engines decode until a request of this client ends, for about `timeout_s`; return all that ended.

        Inside `RequestStream.paused` nothing is decoded.

        Raises:
            RollGspoError: the engines rejected a request of this client, or failed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not self._stream.lock.acquire(left):
                return []
            try:
                if not self._finished and self._error is None and self._numbers:
                    self._stream.work(min(left, SLICE_S))
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if self._finished or self._stream.is_paused or time.monotonic() >= deadline:
                    finished, self._finished = self._finished, []
                    return finished
                idle = not self._numbers
                self._news.clear()
            finally:
                self._stream.lock.release()
            if idle:
                self._news.wait(max(0.0, deadline - time.monotonic()))

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests and return what they have sampled. Unknown keys, and requests that just ended, are ignored.

        A request that ended is returned by `poll`.
        """
        with self._stream.lock.held():
            numbers = [self._numbers[key] for key in keys if key in self._numbers]
            return self._own(self._stream.abort(numbers), forget=True)

    def partials(self) -> list[FinishedRequest]:
        """Return what every unfinished request has sampled. The requests continue."""
        with self._stream.lock.held():
            return self._own(self._stream.partials(list(self._numbers.values())), forget=False)

    def close(self) -> None:
        """Drop all requests."""
        with self._stream.lock.held():
            self._stream.discard(list(self._numbers.values()))
            self._numbers.clear()
            self._finished.clear()

    # called by the stream, which holds the lock

    def deliver(self, key: int, completion: Completion) -> None:
        """Keep the response of a request for `poll`."""
        del self._numbers[key]
        self._finished.append(FinishedRequest(key, completion))
        self._news.set()

    def fail(self, keys: Iterable[int], error: Exception) -> None:
        """Drop requests that the engines rejected; `poll` raises `error`."""
        for key in keys:
            self._numbers.pop(key, None)
        self._error = self._error or error
        self._news.set()

    def _own(self, found: Iterable[tuple[Outstanding, Completion]], forget: bool) -> list[FinishedRequest]:
        if not forget:
            return [FinishedRequest(item.key, completion) for item, completion in found]
        return [FinishedRequest(item.key, c) for item, c in found if self._numbers.pop(item.key, None) is not None]


class RequestStream(ABC):
    """Generation engines that several clients share.

    Unassigned requests wait here. Each goes to the engine with the fewest outstanding tokens that has a free place.
    Subclasses send requests to their engines and collect what has ended.

    Args:
        name: name of the role, for messages.
    """

    def __init__(self, name: str) -> None:
        self.lock = FairLock(name, _LOCK_TIMEOUT_S)
        self._outstanding: dict[int, Outstanding] = {}
        self._numbers = itertools.count()
        self._urgent: deque[Outstanding] = deque()
        self._queue: deque[Outstanding] = deque()
        self._pauses = 0

    def open(self, urgent: bool = False) -> StreamClient:
        """Return a new client. With `urgent`, its waiting requests go before those of other clients."""
        return StreamClient(self, urgent)

    @property
    def num_outstanding(self) -> int:
        """Number of requests of all clients that have not ended."""
        return len(self._outstanding)

    @property
    def is_paused(self) -> bool:
        """True inside `paused`; read it with the lock held."""
        return self._pauses > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no engine compute in the block. Requests stay outstanding, and other threads wait.

        Raises:
            WorkerHungError: another thread used the engines for an hour.
        """
        with self.lock.held():
            self._settle()
            self._pauses += 1
            try:
                yield
            finally:
                self._pauses -= 1

    @abstractmethod
    def check_alive(self) -> None:
        """Check that an engine is left to answer the requests.

        Raises:
            WorkerDiedError: every engine was lost.
        """

    # called by clients, which hold the lock

    def work(self, timeout_s: float) -> None:
        """Let the engines decode and deliver what has ended, for at most about `timeout_s`."""
        if not self.is_paused:
            self._work(timeout_s)

    def enqueue(self, client: StreamClient, request: GenerationRequest) -> int:
        """Queue a request and return its number in the stream."""
        number = next(self._numbers)
        item = self._outstanding[number] = Outstanding(client, request.key, replace(request, key=number))
        (self._urgent if client.urgent else self._queue).append(item)
        return number

    def abort(self, numbers: Sequence[int]) -> list[tuple[Outstanding, Completion]]:
        """Remove requests from the queue and from the engines; return what they have sampled."""
        self._settle()
        held = {f.key: f.completion for f in self._abort([n for n in numbers if n in self._outstanding])}
        removed = [(n, item) for n in numbers if (item := self._outstanding.pop(n, None)) is not None]
        self._forget({number for number, _ in removed})
        return [(item, held.get(number) or _known(item)) for number, item in removed]

    def partials(self, numbers: Sequence[int]) -> list[tuple[Outstanding, Completion]]:
        """Return what requests have sampled."""
        self._settle()
        held = {f.key: f.completion for f in self._partials()}
        items = [self._outstanding[number] for number in numbers if number in self._outstanding]
        return [(item, held.get(item.request.key) or _known(item)) for item in items]

    def discard(self, numbers: Sequence[int]) -> None:
        """Remove requests without waiting for the engines."""
        for number in numbers:
            self._outstanding.pop(number, None)
        self._forget(set(numbers))
        self._discard(numbers)

    # for subclasses

    def _deliver(self, lane: Lane, finished: Sequence[FinishedRequest]) -> None:
        """Hand ended requests to their clients. Those that were discarded meanwhile are ignored."""
        lane.num_ended = len(finished)
        for number, completion in finished:
            lane.remove(number)
            if (item := self._outstanding.pop(number, None)) is not None:
                item.client.deliver(item.key, completion)

    def _reject(self, lane: Lane, items: Sequence[Outstanding], error: Exception) -> None:
        """Drop requests of one client that an engine did not accept."""
        for item in items:
            lane.remove(item.request.key)
            self._outstanding.pop(item.request.key, None)
        items[0].client.fail((item.key for item in items), error)

    def _fail(self, lane: Lane, error: Exception) -> None:
        """Drop all requests of an engine that failed, but lives."""
        by_client: dict[StreamClient, list[Outstanding]] = {}
        for item in lane.held.values():
            by_client.setdefault(item.client, []).append(item)
        for items in by_client.values():
            self._reject(lane, items, error)

    def _requeue(self, lane: Lane) -> int:
        """Put the requests of a lost engine back at the head of the queue, and return their number."""
        items = [item for item in lane.held.values() if item.request.key in self._outstanding]
        for item in reversed(items):
            if item.reported is not None:
                item.request, item.reported = replace(item.request, partial=item.reported), None
            (self._urgent if item.client.urgent else self._queue).appendleft(item)
        lane.held.clear()
        lane.load = lane.num_ended = 0
        return len(items)

    def _feed(self, lanes: Sequence[Lane]) -> None:
        """Send waiting requests to the least loaded engines with a free place: one call per engine and client."""
        free = [(lane.load, index) for index, lane in enumerate(lanes) if lane.room > 0]
        heapq.heapify(free)
        batches: dict[tuple[int, StreamClient], list[Outstanding]] = {}
        while free and (queue := self._urgent or self._queue):
            item = queue.popleft()
            _, index = free[0]
            lane = lanes[index]
            lane.add(item)
            batches.setdefault((index, item.client), []).append(item)
            if lane.room > 0:
                heapq.heapreplace(free, (lane.load, index))
            else:
                heapq.heappop(free)
        for (index, _), items in batches.items():
            self._send(lanes[index], items)

    def _forget(self, numbers: set[int]) -> None:
        if any(item.request.key in numbers for queue in (self._urgent, self._queue) for item in queue):
            self._urgent = deque(item for item in self._urgent if item.request.key not in numbers)
            self._queue = deque(item for item in self._queue if item.request.key not in numbers)

    @abstractmethod
    def _send(self, lane: Lane, items: Sequence[Outstanding]) -> None:
        """Submit requests of one client to the engine of `lane`."""

    @abstractmethod
    def _work(self, timeout_s: float) -> None: ...

    @abstractmethod
    def _settle(self) -> None:
        """Wait until no engine computes, and deliver what has ended."""

    @abstractmethod
    def _abort(self, numbers: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests from the engines, which do not compute now, and from their lanes."""

    @abstractmethod
    def _partials(self) -> list[FinishedRequest]:
        """Return what the requests in the engines have sampled; the engines do not compute now."""

    @abstractmethod
    def _discard(self, numbers: Sequence[int]) -> None:
        """Remove requests from the engines without waiting."""


def _known(item: Outstanding) -> Completion:
    """Return the tokens that a request contains."""
    return item.request.partial or Completion((), (), "partial")
