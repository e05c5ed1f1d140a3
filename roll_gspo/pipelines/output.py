"""What a run leaves behind: metrics, rollouts, checkpoints, report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.checkpoint import HF_EXPORT, Best, CheckpointStore
from roll_gspo.pipelines.records import response_metrics, rollout_records
from roll_gspo.pipelines.state import RunState
from roll_gspo.pipelines.validation import ScoredBatch, validation_records
from roll_gspo.report.page import write_report
from roll_gspo.rewards.base import RewardResult
from roll_gspo.roles.trained import TrainedPolicy, TrainedRole
from roll_gspo.tracking.base import Trackers
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.live import VALIDATION_METRICS
from roll_gspo.tracking.rollouts import RolloutWriter, UpdatedRecord

logger = logging.getLogger(__name__)


class Output:
    """Writes everything below the run's folder.

    Args:
        folder: the run's.
        checkpoints: where they are kept.
        trackers: metrics.jsonl and what `track_with` adds.
        rollouts: writer of the samples.
        validation: writer of the validation samples.
        console: the live view.
        config_text: `config.yaml`, kept in every checkpoint.
        save_hf_model: export the actor in Hugging Face layout with every checkpoint.
        asynchronous: go on while a checkpoint is written.
        decode: token ids to text.
    """

    def __init__(
        self,
        folder: Path,
        checkpoints: CheckpointStore,
        trackers: Trackers,
        rollouts: RolloutWriter,
        validation: RolloutWriter,
        console: Console,
        config_text: str,
        save_hf_model: bool,
        asynchronous: bool,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._folder = folder
        self._checkpoints = checkpoints
        self._trackers = trackers
        self._rollouts = rollouts
        self._validation = validation
        self._console = console
        self._config_text = config_text
        self._save_hf_model = save_hf_model
        self._asynchronous = asynchronous
        self._saving: tuple[int, Best | None, list[TrainedRole[Any]]] | None = None
        self._decode = decode

    def before_training(self, metrics: Mapping[str, float]) -> None:
        """Step 0: the validation of the policy that training starts from."""
        if metrics:
            self._trackers.log(0, metrics)
            figure = next(metrics[name] for name in VALIDATION_METRICS if name in metrics)
            self._console.message(f"validation before training: {figure:.3f}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a finished step, to every tracker and the console."""
        self._trackers.log(step, metrics)
        self._console.step(step, metrics)

    def write_rollouts(
        self,
        step: int,
        rollouts: Rollouts,
        domains: Sequence[str],
        results: Sequence[RewardResult],
        batch: TrainBatch,
    ) -> None:
        """Every sample of the step, with the reward block that judged it; `batch` is what is trained on of them."""
        self._rollouts.write(step, rollout_records(rollouts, domains, results, self._decode, batch))

    def write_validation(self, step: int, batches: Iterable[ScoredBatch]) -> None:
        """Every validation sample of the step, as the batches come."""
        self._validation.write(
            step, (record for batch in batches for record in validation_records(batch, self._decode))
        )

    def write_updated(self, step: int, rows: Tensor, log_probs: Tensor, mask: Tensor) -> None:
        """Log-probs [b, T] of the samples `rows` [b] after the step's update; `mask` [b, T] is that of the response."""
        samples = enumerate(rows.tolist())
        records = [UpdatedRecord(sample, response_metrics(log_probs, mask, place)) for place, sample in samples]
        self._rollouts.write_updated(step, records)

    def save(
        self, step: int, state: RunState[Any], roles: Mapping[str, TrainedRole[Any]], policy: TrainedPolicy
    ) -> None:
        """Write a checkpoint of the run, then the report.

        With asynchronous saving the checkpoint is complete only after `finish_save`.

        Args:
            step: the last completed step.
            state: the run's progress.
            roles: the trained roles, by the name of their folder in the checkpoint.
            policy: the role that is exported in Hugging Face layout if `save_hf_model`.

        Raises:
            CheckpointError: this checkpoint or the one before it cannot be written; complete ones are untouched.
        """
        self.finish_save()
        folder = self._checkpoints.begin(step)
        with self._checkpoints.filling(step):
            if self._save_hf_model:
                (folder / HF_EXPORT).mkdir()
                policy.save_hf(folder / HF_EXPORT)
            state.save(folder)
            (folder / "config.yaml").write_text(self._config_text, encoding="utf-8")
            for name, role in roles.items():
                (folder / name).mkdir()
                role.save(folder / name, self._asynchronous)
        self._saving = step, state.best, list(roles.values())
        self.finish_save(wait=not self._asynchronous)
        self.report()

    def finish_save(self, wait: bool = True) -> None:
        """Complete the checkpoint that is being written, if there is one and its files are there; `wait` for them.

        Raises:
            CheckpointError: it cannot be written; earlier ones are untouched.
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
        """The folder in Hugging Face layout of a step that was saved; None where none is exported."""
        return self._checkpoints.folder / f"step_{step:06d}" / HF_EXPORT if self._save_hf_model else None

    def report(self) -> Path | None:
        """Write the report of what there is by now and return its path; one that fails does not end a training."""
        try:
            return write_report(self._folder)
        except Exception as error:
            logger.warning("no report.html (%s); python -m roll_gspo.report %s writes it", error, self._folder)
            return None

    def close(self) -> None:
        """Close the trackers; calling it twice is harmless."""
        self._trackers.close()


def traced_samples(rollouts: Rollouts, results: Sequence[RewardResult], num_groups: int) -> Tensor:
    """Rows of the first groups whose scores differ, and of the first others where those are too few."""
    scores: dict[int, set[float]] = {}
    for group, result in zip(rollouts.group_ids.tolist(), results, strict=True):
        scores.setdefault(group, set()).add(result.score)
    chosen = sorted(scores, key=lambda group: len(scores[group]) == 1)[:num_groups]
    return torch.isin(rollouts.group_ids, torch.tensor(chosen, dtype=rollouts.group_ids.dtype)).nonzero().flatten()
