"""Timing of a step by named stages, which add up exactly to the time of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageTimer:
    """Charges every second to exactly one stage, or to `other` outside of all stages.

    Stages may nest: the inner one's time is not counted again in the outer one. Stages of one name add up.
    Use from one thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._mark = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge what happens inside to `time/<name>`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """End the step: seconds since the last lap by stage, `time/other`, and their sum `time/step`.

        What happens afterwards (logging the step, saving a checkpoint of it) counts to the next step, so
        the `time/step` of all steps sum to the time the run took.
        """
        self._charge()
        stages = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        stages.setdefault("time/other", 0.0)
        self._seconds = {}
        return {"time/step": sum(stages.values()), **stages}

    def _charge(self) -> None:
        now = self._clock()
        owner = self._open[-1] if self._open else "other"
        self._seconds[owner] = self._seconds.get(owner, 0.0) + now - self._mark
        self._mark = now
