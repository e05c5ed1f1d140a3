"""torch-profiler traces of the calls of a role."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

TRACES = "profile"
"""Folder of the traces, below that of the run."""


@dataclass(frozen=True)
class TraceTarget:
    """Where the traces of one step of one process of a role go.

    Attributes:
        folder: created with the first trace.
        role: name of the role.
        rank: of the process.
        step: the training step.
    """

    folder: Path
    role: str
    rank: int
    step: int

    def path(self, call: int, method: str) -> Path:
        """Return the file of a call: the role's `call`-th of the step, counted from 1."""
        return self.folder / f"{self.role}_rank{self.rank}_step{self.step:06d}_{call:02d}_{method}.json.gz"


@contextmanager
def record_trace(path: Path) -> Iterator[None]:
    """Record a Chrome trace of the block. A profiler that fails costs a warning, not the training."""
    # Kineto writes a line per start and stop to standard error, past every logger.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = profile(activities=activities)
    try:
        profiler.start()
    except Exception as error:
        logger.warning("profiler: no trace %s: %s", path.name, error)
        yield
        return
    try:
        yield
    finally:
        try:
            profiler.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except Exception as error:
            logger.warning("profiler: no trace %s: %s", path.name, error)
