"""Every tracker of a run: metrics.jsonl, and those that `track_with` names."""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from roll_gspo.config.trackers import TRACKERS
from roll_gspo.errors import ConfigError, MissingDependencyError
from roll_gspo.printable import printable_line
from roll_gspo.registry import did_you_mean
from roll_gspo.tracking.background import BackgroundTracker
from roll_gspo.tracking.base import RunInfo, Tracker
from roll_gspo.tracking.jsonl import JsonlTracker
from roll_gspo.tracking.samples import Sample

RUN_IDS = "trackers.json"
CLOSE_TIMEOUT_S = 60.0

Options = Mapping[str, Mapping[str, Any]]
"""Options of each tracker, by its name."""


class Trackers:
    """metrics.jsonl and the trackers of `track_with`.

    An error in metrics.jsonl stops the run, because it could not be resumed or reported. The other trackers run in
    the background and never stop it.

    Args:
        record: metrics.jsonl.
        others: the other trackers.
        close_timeout_s: seconds that all of them together may take to close.
    """

    def __init__(
        self, record: JsonlTracker, others: Sequence[BackgroundTracker], close_timeout_s: float = CLOSE_TIMEOUT_S
    ) -> None:
        self._record = record
        self._others = others
        self._close_timeout_s = close_timeout_s

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step. Names may hold text of the data, e.g. of `validation.group_by`."""
        metrics = {printable_line(name): value for name, value in metrics.items()}
        self._record.log(step, metrics)
        for tracker in self._others:
            tracker.submit(f"step {step}", lambda backend: backend.log(step, metrics))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record a few rollouts of one step; metrics.jsonl does not hold them."""
        for tracker in self._others:
            tracker.submit(f"samples of step {step}", lambda backend: backend.log_samples(step, samples))

    def finish(self, report: Path | None) -> None:
        """Record that the run ended in order, with its report, and close every tracker."""
        for tracker in self._others:
            tracker.submit("finish", lambda backend: backend.finish(report))
        self.close()

    def close(self) -> None:
        """Close every tracker. A second call does nothing."""
        try:
            for tracker in self._others:
                tracker.stop()
            deadline = time.monotonic() + self._close_timeout_s
            for tracker in self._others:
                tracker.join(max(0.0, deadline - time.monotonic()))
        finally:
            self._record.close()


def check_trackers(names: Sequence[str], options: Options) -> None:
    """Import every tracker and check the names of its options.

    Raises:
        ConfigError: a tracker does not exist, or does not take an option.
        MissingDependencyError: a tracker's package is not installed.
    """
    for name in names:
        _check_options(name, _load(name), options.get(name, {}))


def build_trackers(names: Sequence[str], run: RunInfo, options: Options | None = None) -> Trackers:
    """Open metrics.jsonl in the run's folder and start the trackers called `names`.

    The ids of their runs are kept in `trackers.json`, so that a resumed process continues them.

    Args:
        names: values of `track_with`.
        run: the run. Its folder is created if missing.
        options: the options of each tracker.

    Raises:
        ConfigError: a tracker does not exist, or does not take an option.
        MissingDependencyError: a tracker's package is not installed.
    """
    options = options or {}
    check_trackers(names, options)
    run.folder.mkdir(parents=True, exist_ok=True)
    ids = _RunIds(run.folder / RUN_IDS)
    others = []
    for name in names:
        factory = partial(_load(name), replace(run, run_id=ids.get(name)), **options.get(name, {}))
        others.append(BackgroundTracker(name, partial(_start, name, factory, ids)))
    return Trackers(JsonlTracker(run.folder / "metrics.jsonl", run.first_step), others)


class _RunIds:
    """The `run_id` of each tracker, in a file that is complete or absent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, name: str) -> str | None:
        return self._ids.get(name)

    def save(self, name: str, run_id: str) -> None:
        with self._lock:
            if self._ids.get(name) == run_id:
                return
            self._ids[name] = run_id
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps(self._ids, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self._path)


def _start(name: str, factory: Callable[[], Tracker], ids: _RunIds) -> Tracker:
    tracker = factory()
    if tracker.run_id is not None:
        ids.save(name, tracker.run_id)
    return tracker


def _load(name: str) -> Callable[..., Tracker]:
    try:
        return TRACKERS.load(name)
    except MissingDependencyError as error:
        if name not in TRACKERS:
            raise
        text = f"track_with: {name} needs the package '{error.name}': pip install 'roll-gspo[{name}]'"
        raise MissingDependencyError(text, name=error.name) from error


def _check_options(name: str, factory: Callable[..., Tracker], options: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(factory).parameters.values())[1:]  # the first is the run
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            listed = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"tracker_kwargs.{name}.{option}: {name} has no such option{hint} ({listed})")
