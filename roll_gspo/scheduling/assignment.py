"""Assignment of requests to engines: the engine with the least outstanding tokens gets the next request."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def least_loaded(loads: Sequence[float], capacities: Sequence[int]) -> int | None:
    """Return the engine with the smallest load among those with free capacity.

    Args:
        loads: outstanding tokens per engine.
        capacities: requests that each engine can still admit.

    Returns:
        The index of the engine, the lowest of equal ones. None if every engine is full.
    """
    open_engines = [engine for engine, free in enumerate(capacities) if free > 0]
    return min(open_engines, key=lambda engine: loads[engine], default=None)


class EngineLoads:
    """Outstanding requests per engine. It chooses as `least_loaded` does, in logarithmic time.

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
