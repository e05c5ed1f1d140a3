"""torch-profiler traces of the calls of a role."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
_active = threading.Lock()

TRACES = "profile"
"""Folder of the traces, below that of the run."""


@dataclass(frozen=True)
class TraceTarget:
    """Destination of the traces of one step of a role.

    Attributes:
        folder: created with the first trace.
        role: name of the role.
        step: the training step.
        rank: of the process; None if it is that in the process group.
    """

    folder: Path
    role: str
    step: int
    rank: int | None = None

    def path(self, call: int, method: str) -> Path:
        """Return the file of a call: the role's `call`-th of the step, counted from 1."""
        rank = group_rank() if self.rank is None else self.rank
        return self.folder / f"{self.role}_rank{rank}_step{self.step:06d}_{call:02d}_{method}.json.gz"


def group_rank() -> int:
    """Return the rank of this process in its process group, 0 if it has none."""
    from torch import distributed

    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


@contextmanager
def record_trace(path: Path) -> Iterator[None]:
    """Record a Chrome trace of the block. A profiler that fails costs a warning, not the training.

    A block inside of another one, or at the same time in another thread, has no trace: two active profilers end a
    process with a segmentation fault (torch 2.13).
    """
    if not _active.acquire(blocking=False):
        yield
        return
    try:
        with _recorded(path):
            yield
    finally:
        _active.release()


@contextmanager
def _recorded(path: Path) -> Iterator[None]:
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
