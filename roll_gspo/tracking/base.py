"""The Tracker protocol, the table of shipped trackers, and the one object that a pipeline logs to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from roll_gspo.errors import ConfigError
from roll_gspo.registry import Registry
from roll_gspo.tracking.jsonl import JsonlTracker

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the figures of each step.

    A tracker is built as `factory(folder, first_step, **tracker_kwargs)`: `folder` is the run's output
    folder and `first_step` the first step this process will log; what an earlier process logged from
    `first_step` on (after the checkpoint that is resumed) must not show up twice.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the figures of one finished step."""
        ...

    def close(self) -> None:
        """Write out what is still held back; nothing is logged afterwards."""
        ...


TRACKERS = Registry(
    "track_with",
    {
        "tensorboard": "roll_gspo.tracking.tensorboard:TensorBoardTracker",
        "stdout": "roll_gspo.tracking.stdout:StdoutTracker",
        "none": "roll_gspo.tracking.base:NullTracker",
    },
)


class NullTracker:
    """Only metrics.jsonl is wanted, which is always written."""

    def __init__(self, folder: Path, first_step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Trackers:
    """metrics.jsonl, always, and whatever else was asked for.

    A failing extra tracker (a full disk, a dead server) costs a warning and is left out from then on;
    a failing metrics.jsonl is an error, for the run could not be resumed or reported.
    """

    def __init__(self, record: JsonlTracker, extra: Sequence[Tracker]) -> None:
        self._record = record
        self._extra = list(extra)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the figures of one finished step everywhere."""
        self._record.log(step, metrics)
        for tracker in list(self._extra):
            try:
                tracker.log(step, metrics)
            except Exception as error:
                self._extra.remove(tracker)
                name = type(tracker).__name__
                logger.warning("%s: step %d: %s; it is left out from now on", name, step, error)

    def close(self) -> None:
        """Close every tracker; metrics.jsonl last, whatever the others do."""
        try:
            for tracker in self._extra:
                tracker.close()
        finally:
            self._record.close()


def build_trackers(
    names: Sequence[str], folder: Path, first_step: int = 1, tracker_kwargs: Mapping[str, Any] | None = None
) -> Trackers:
    """Open metrics.jsonl in `folder` and the trackers called `names`.

    Args:
        names: values of `track_with`.
        folder: the run's output folder; made if missing.
        first_step: first step that will be logged; later lines of an earlier process are dropped.
        tracker_kwargs: the YAML block of that name, passed to the factories as it is.

    Raises:
        ConfigError: unknown name, or a keyword that the tracker does not take.
        MissingDependencyError: the tracker's package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    extra: list[Tracker] = []
    for name in names:
        factory = TRACKERS.load(name)
        try:
            extra.append(factory(folder, first_step, **(tracker_kwargs or {})))
        except TypeError as error:
            raise ConfigError(f"tracker_kwargs: {error} (track_with: {name})") from error
    return Trackers(JsonlTracker(folder / "metrics.jsonl", first_step), extra)
