"""Assignment of requests to engines."""

from __future__ import annotations

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
