"""Assignment of requests to engines, as the request stream of a run does it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class EngineLoads:
    """Outstanding tokens per engine. The next request goes to the engine with the fewest that has free capacity.

    Of equal engines, the first one is chosen. Both operations take logarithmic time.

    Args:
        capacities: requests that each engine can admit.
    """

    def __init__(self, capacities: Sequence[int]) -> None:
        self._free = list(capacities)
        self._loads = [0] * len(capacities)
        self._heap = [(0, engine) for engine in range(len(capacities))]  # holds outdated pairs too

    def assign(self, tokens: int) -> int | None:
        """Choose the engine of a request of at most `tokens` tokens; None if every engine is full."""
        while self._heap:
            load, engine = self._heap[0]
            if self._free[engine] < 1 or load != self._loads[engine]:
                heapq.heappop(self._heap)
                continue
            self._free[engine] -= 1
            self._loads[engine] += tokens
            heapq.heapreplace(self._heap, (self._loads[engine], engine))
            return engine
        return None

    def release(self, engine: int, tokens: int) -> None:
        """Remove a request of an engine, with the `tokens` that it was assigned with."""
        self._free[engine] += 1
        self._loads[engine] -= tokens
        heapq.heappush(self._heap, (self._loads[engine], engine))
