"""The Tracker protocol and what a tracker is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from roll_gspo.tracking.samples import Sample


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run that a tracker records.

    Attributes:
        folder: the run's output folder, which exists.
        name: name of the run.
        experiment: name of the experiment that the run belongs to.
        first_step: the first step that this process logs. A tracker hides what an earlier process logged from this
            step on, if its backend can.
        tags: labels of the run.
        config: the resolved configuration; JSON types only.
        run_id: the `run_id` that this tracker had in an earlier process of the same run; None if there was none.
    """

    folder: Path
    name: str
    experiment: str
    first_step: int = 1
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    run_id: str | None = None


class Tracker(Protocol):
    """A backend that records one run.

    A tracker is built as `factory(run, **options)`: `run` is the `RunInfo`, and `options` are its block of
    `tracker_kwargs`. All calls come from one separate thread, so a tracker may block. A tracker that raises is
    dropped; training continues.
    """

    run_id: str | None
    """Id of the run in the backend; a resumed process finds it in `RunInfo.run_id`. None if the backend has none."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record a few rollouts of one step. Called before `log` of that step."""
        ...

    def finish(self, report: Path | None) -> None:
        """Record that the run ended in order, and its `report.html` if it could be written. `close` follows."""
        ...

    def close(self) -> None:
        """Flush and release the backend. A run that is closed without `finish` has failed."""
        ...
