"""The output of a run: metrics, checkpoints, report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from roll_gspo.checkpoint import HF_EXPORT, Best, CheckpointStore
from roll_gspo.pipelines.state import ACTOR, RunState
from roll_gspo.report.page import write_report
from roll_gspo.roles.trained import TrainedPolicy, TrainedRole
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.live import VALIDATION_METRICS
from roll_gspo.tracking.samples import Sample
from roll_gspo.tracking.trackers import Trackers

logger = logging.getLogger(__name__)
REPORT_INTERVAL_S = 60.0  # a report takes about a second: not after every checkpoint of a fast run


class BackgroundFiles(Protocol):
    """Files that are written while training goes on."""

    def flush(self) -> None:
        """Wait until everything is written, or raise the error that prevents it."""
        ...

    def close(self) -> None:
        """Write what is left and stop."""
        ...


class Output:
    """Write metrics, checkpoints and report of a run.

    Args:
        folder: the run's folder.
        checkpoints: its checkpoints.
        trackers: metrics.jsonl and the trackers of `track_with`.
        console: the live view.
        config_text: `config.yaml`, kept in every checkpoint.
        save_hf_model: export the policy in Hugging Face layout with every checkpoint.
        asynchronous: continue training while a checkpoint is written.
        files: further files of the run; they are complete before a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        checkpoints: CheckpointStore,
        trackers: Trackers,
        console: Console,
        config_text: str,
        save_hf_model: bool,
        asynchronous: bool,
        files: BackgroundFiles | None = None,
    ) -> None:
        self._folder = folder
        self._checkpoints = checkpoints
        self._trackers = trackers
        self._console = console
        self._config_text = config_text
        self._save_hf_model = save_hf_model
        self._asynchronous = asynchronous
        self._files = files
        self._saving: tuple[int, Best | None, list[TrainedRole[Any]]] | None = None
        self._reported_at = time.monotonic()

    def before_training(self, metrics: Mapping[str, float]) -> None:
        """Log the validation of the initial policy as step 0, if there is one."""
        if metrics:
            self._trackers.log(0, metrics)
            value = next(metrics[name] for name in VALIDATION_METRICS if name in metrics)
            self._console.message(f"validation before training: {value:.3f}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a completed step to every tracker and the console."""
        self._trackers.log(step, metrics)
        self._console.step(step, metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Send a few rollouts of a step to every tracker."""
        self._trackers.log_samples(step, samples)

    def save(
        self,
        step: int,
        state: RunState[Any],
        roles: Mapping[str, TrainedRole[Any]],
        policy: TrainedPolicy,
        before_save: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Write a checkpoint of the run, then the report if the last one is older than `REPORT_INTERVAL_S`.

        With asynchronous saving the checkpoint is complete only after `finish_save`.

        Args:
            step: the last completed step.
            state: the run's progress.
            roles: the trained roles, by the name of their folder in the checkpoint.
            policy: the role that is exported in Hugging Face layout if `save_hf_model`.
            before_save: called with the name of a role before its state or its model is read.

        Raises:
            CheckpointError: this checkpoint or the one before it cannot be written; complete ones are untouched.
            TrainingError: the samples of the steps before it cannot be written.
        """
        if self._files is not None:
            self._files.flush()
        self.finish_save()
        folder = self._checkpoints.begin(step)
        with self._checkpoints.filling(step):
            if self._save_hf_model:
                before_save(ACTOR)
                (folder / HF_EXPORT).mkdir()
                policy.save_hf(folder / HF_EXPORT)
            state.save(folder)
            (folder / "config.yaml").write_text(self._config_text, encoding="utf-8")
            for name, role in roles.items():
                before_save(name)
                (folder / name).mkdir()
                role.save(folder / name, self._asynchronous)
        self._saving = step, state.best, list(roles.values())
        self.finish_save(wait=not self._asynchronous)
        if time.monotonic() - self._reported_at >= REPORT_INTERVAL_S:
            self.report()

    def finish_save(self, wait: bool = True) -> None:
        """Complete the checkpoint that is being written, if any, once its files are written.

        Args:
            wait: wait for the files; else return if they are not complete.

        Raises:
            CheckpointError: the checkpoint cannot be written; complete ones are untouched.
        """
        if self._saving is None:
            return
        (step, best, roles), self._saving = self._saving, None
        with self._checkpoints.filling(step):
            if not all(role.finish_save(wait) for role in roles):
                self._saving = step, best, roles
                return
        self._checkpoints.complete(step, best)
        logger.info("checkpoint of step %d: %s", step, os.path.relpath(self._checkpoints.folder))

    def hf_model(self, step: int) -> Path | None:
        """Return the export in Hugging Face layout of a saved step, None without `save_hf_model`."""
        return self._checkpoints.folder / f"step_{step:06d}" / HF_EXPORT if self._save_hf_model else None

    def report(self) -> Path | None:
        """Write the report of the run up to now and return its path; None if it fails, which does not end the run."""
        self._reported_at = time.monotonic()
        try:
            return write_report(self._folder)
        except Exception as error:
            logger.warning("no report.html (%s); python -m roll_gspo.report %s writes it", error, self._folder)
            return None

    def finish(self, report: Path | None) -> None:
        """Close the trackers of a run that ended in order, with its report."""
        self._trackers.finish(report)

    def close(self) -> None:
        """Close the trackers and the background files. Calling it again does nothing."""
        try:
            self._trackers.close()
        finally:
            if self._files is not None:
                self._files.close()
