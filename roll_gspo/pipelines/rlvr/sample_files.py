"""The files of samples in a run's folder: rollouts/ and validation/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.config.batch import LogRolloutsConfig
from roll_gspo.pipelines.rlvr.sample_records import (
    rows_with_text,
    sample_batch,
    token_lists_of,
    traced_samples,
    tracked_samples,
)
from roll_gspo.pipelines.rlvr.validation import ScoredBatch
from roll_gspo.rewards.base import RewardResult
from roll_gspo.tracking.rollouts import RolloutWriter, SampleBatch
from roll_gspo.tracking.samples import Sample
from roll_gspo.tracking.token_texts import TokenTexts


class SampleFiles:
    """Write the samples of training and validation in the background.

    Args:
        folder: the run's folder.
        decode: converts token ids to text.
        first_step: files of this step and later come from an earlier process and are removed.
        config: what to write; None writes no files.
        trace_groups: number of groups per step that are scored again after the update.
    """

    def __init__(
        self,
        folder: Path,
        decode: Callable[[Sequence[int]], str],
        first_step: int,
        config: LogRolloutsConfig | None,
        trace_groups: int,
    ) -> None:
        self._rollouts = RolloutWriter(folder / "rollouts", first_step)
        self._validation = RolloutWriter(folder / "validation", first_step)
        self._texts = TokenTexts(decode)
        self._config = config
        self._trace_groups = trace_groups if config else 0

    def write_rollouts(
        self,
        step: int,
        rollouts: Rollouts,
        domains: Sequence[str],
        results: Sequence[RewardResult],
        batch: TrainBatch,
        version: int,
    ) -> None:
        """Write every sample of the step.

        Args:
            step: step of the rollout.
            rollouts, domains, results: the samples, and the reward block and the result of each.
            batch: the training batch that was built from them.
            version: version of the trainer's weights before the update.
        """
        if self._config is not None:
            traced = self.traced(rollouts, results).tolist()
            chosen = rows_with_text(rollouts, results, self._config.samples, traced)
            samples = sample_batch(rollouts, domains, results, self._texts, chosen, batch, version=version)
            self._rollouts.write(step, [samples])

    def tracked(
        self, rollouts: Rollouts, domains: Sequence[str], results: Sequence[RewardResult], batch: TrainBatch
    ) -> list[Sample]:
        """Return a few samples of the step for trackers."""
        return tracked_samples(rollouts, domains, results, batch.advantages, self._texts)

    def write_validation(self, step: int, batches: Iterable[ScoredBatch]) -> None:
        """Write every validation sample, batch by batch."""
        if self._config is None:
            for _ in batches:
                pass
        else:
            self._validation.write(step, validation_samples(batches, self._texts, self._config.samples))

    def traced(self, rollouts: Rollouts, results: Sequence[RewardResult]) -> Tensor:
        """Return the rows of the samples to score again after the update of their step."""
        return traced_samples(rollouts, results, self._trace_groups)

    def write_updated(self, step: int, rows: Tensor, log_probs: Tensor, mask: Tensor) -> None:
        """Write log-probs [b, T] of the samples `rows` [b] after the step's update; `mask` [b, T] marks responses."""
        self._rollouts.write_updated(step, rows.tolist(), token_lists_of(log_probs, mask))

    def flush(self) -> None:
        """Wait until every file is written.

        Raises:
            TrainingError: a file cannot be written.
        """
        self._rollouts.flush()
        self._validation.flush()

    def close(self) -> None:
        """Write what is left and stop."""
        self._rollouts.close()
        self._validation.close()


def validation_samples(
    batches: Iterable[ScoredBatch], texts: TokenTexts, limit: int | None = None
) -> Iterator[SampleBatch]:
    """Yield the samples of each batch as columns. The first `limit` samples have texts."""
    first = 0
    for batch in batches:
        left = None if limit is None else max(limit - first, 0)
        chosen = range(len(batch.rollouts))[:left]
        yield sample_batch(
            batch.rollouts, batch.domains, batch.results, texts, chosen, first=first, first_group=batch.first
        )
        first += len(batch.rollouts)
