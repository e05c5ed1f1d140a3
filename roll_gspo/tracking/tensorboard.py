"""Event files for TensorBoard, written with its own package: torch is not needed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardTracker:
    """Scalars under their metric names.

    Args:
        folder: the run's output folder.
        first_step: TensorBoard hides what earlier processes logged from this step on.
        log_dir: where the event files go; by default `tensorboard/` in `folder`.
    """

    def __init__(self, folder: Path, first_step: int, log_dir: str | None = None) -> None:
        self._writer = EventFileWriter(str(log_dir or folder / "tensorboard"))
        # A START record tells TensorBoard that this step and all later ones begin anew.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event with every figure; NaN and infinity are kept, TensorBoard marks them."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._writer.close()
