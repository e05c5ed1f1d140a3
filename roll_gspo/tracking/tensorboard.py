"""TensorBoard event files, written with TensorBoard's own package."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.samples import Sample


class TensorBoardTracker(Tracker):
    """Write metrics as scalars, and configuration, samples and the path of the report as text.

    TensorBoard has no run ids: the folder of the event files is the run.

    Args:
        run: the run. TensorBoard hides what earlier processes logged from its `first_step` on.
        log_dir: folder of the event files; default: `tensorboard/` in the run's folder.
    """

    run_id = None

    def __init__(self, run: RunInfo, *, log_dir: str | None = None) -> None:
        self._writer = EventFileWriter(str(log_dir or run.folder / "tensorboard"))
        self._step = run.first_step
        # A START record tells TensorBoard that this step and all later ones begin anew.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=run.first_step, session_log=start))
        self._text("config", json.dumps(run.config, indent=2, ensure_ascii=False))
        if run.tags:
            self._text("tags", ", ".join(run.tags))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()
        self._step = step

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._step = step
        for i, sample in enumerate(samples, start=1):
            self._text(f"samples/{i}", sample.text)

    def finish(self, report: Path | None) -> None:
        if report is not None:
            self._text("report", str(report.resolve()))

    def close(self) -> None:
        self._writer.close()

    def _text(self, tag: str, text: str) -> None:
        code = textwrap.indent(text, "    ", lambda line: True)  # Markdown shows indented lines as they are
        self._writer.add_event(Event(wall_time=time.time(), step=self._step, summary=text_pb(tag, code)))
