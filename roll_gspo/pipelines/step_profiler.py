"""Profiling of a window of training steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from roll_gspo.config.run import RunConfig
from roll_gspo.errors import WorkerError
from roll_gspo.roles.profiled import Profilable
from roll_gspo.tracking.profiler import TRACES, TraceTarget

logger = logging.getLogger(__name__)


class StepProfiler:
    """Tells roles which steps to profile.

    Args:
        config: its block `profiler` decides.
        folder: the run's folder.
        roles: the roles that hold a model, by name.
    """

    def __init__(self, config: RunConfig, folder: Path, roles: Mapping[str, Profilable]) -> None:
        torch_profiler = config.profiler and config.profiler.torch
        self._first, self._last = torch_profiler.steps if torch_profiler else (0, -1)
        self._folder = folder.resolve() / TRACES
        self._roles = roles

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile what the roles do inside, if the step is in the window."""
        if not self._first <= step <= self._last:
            yield
            return
        self._set({name: TraceTarget(self._folder, name, step) for name in self._roles})
        try:
            yield
        finally:
            self._set(dict.fromkeys(self._roles))
        if step == self._last:
            logger.info("profiler: traces of steps %d to %d: %s", self._first, self._last, self._folder)

    def _set(self, targets: Mapping[str, TraceTarget | None]) -> None:
        for name, role in self._roles.items():
            try:
                role.profile(targets[name])
            except WorkerError as error:  # the next call of the role restarts its worker, or ends the run
                logger.warning("profiler: %s: %s", name, error)
