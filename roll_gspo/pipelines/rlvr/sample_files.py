"""The files of samples in a run's folder: rollouts/ and validation/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.pipelines.rlvr.sample_records import response_values, rollout_records
from roll_gspo.pipelines.rlvr.validation import ScoredBatch, validation_records
from roll_gspo.rewards.base import RewardResult
from roll_gspo.tracking.rollouts import RolloutWriter, UpdatedRecord
from roll_gspo.tracking.samples import SampleTable


class SampleFiles:
    """Write the samples of training and validation.

    Args:
        folder: the run's folder.
        decode: converts token ids to text.
        first_step: files of this step and later come from an earlier process and are removed.
    """

    def __init__(self, folder: Path, decode: Callable[[Sequence[int]], str], first_step: int) -> None:
        self._rollouts = RolloutWriter(folder / "rollouts", first_step)
        self._validation = RolloutWriter(folder / "validation", first_step)
        self._decode = decode

    def write_rollouts(
        self,
        step: int,
        rollouts: Rollouts,
        domains: Sequence[str],
        results: Sequence[RewardResult],
        batch: TrainBatch,
        table: SampleTable | None = None,
    ) -> None:
        """Write every sample of the step.

        Args:
            step: step of the rollout.
            rollouts, domains, results: the samples, and the reward block and the result of each.
            batch: the training batch that was built from them.
            table: collects the samples for trackers.
        """
        records = rollout_records(rollouts, domains, results, self._decode, batch)
        self._rollouts.write(step, records if table is None else table.collect(records))

    def write_validation(self, step: int, batches: Iterable[ScoredBatch]) -> None:
        """Write every validation sample, batch by batch."""
        self._validation.write(
            step, (record for batch in batches for record in validation_records(batch, self._decode))
        )

    def write_updated(self, step: int, rows: Tensor, log_probs: Tensor, mask: Tensor) -> None:
        """Write log-probs [b, T] of the samples `rows` [b] after the step's update; `mask` [b, T] marks responses."""
        samples = enumerate(rows.tolist())
        records = [UpdatedRecord(sample, response_values(log_probs, mask, place)) for place, sample in samples]
        self._rollouts.write_updated(step, records)


def traced_samples(rollouts: Rollouts, results: Sequence[RewardResult], num_groups: int) -> Tensor:
    """Return the rows of the first `num_groups` groups, those with different scores before the others."""
    scores: dict[int, set[float]] = {}
    for group, result in zip(rollouts.group_ids.tolist(), results, strict=True):
        scores.setdefault(group, set()).add(result.score)
    chosen = sorted(scores, key=lambda group: len(scores[group]) == 1)[:num_groups]
    return torch.isin(rollouts.group_ids, torch.tensor(chosen, dtype=rollouts.group_ids.dtype)).nonzero().flatten()
