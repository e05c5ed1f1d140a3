"""The policy in supervised fine-tuning: one optimizer step per mini-batch of demonstrations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.sft_loss import negative_log_likelihood, sft_loss
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.roles.mini_batches import MiniBatches, summary
from roll_gspo.roles.profiled import profiled
from roll_gspo.roles.trained import TrainedPolicy
from roll_gspo.strategies.base import TokenScores, TrainStrategy, UpdateResult
from roll_gspo.strategies.micro_batches import MicroBatching


class SftActor(TrainedPolicy):
    """The role `actor_train` with `pipeline: sft`.

    Args:
        strategy: engine that holds the model and its optimizer.
        mini_batch_size: samples per optimizer step.
        micro_batching: splits a mini-batch into forward and backward passes.
        max_consecutive_skipped_steps: number of consecutive non-finite optimizer steps after which training stops.
    """

    def __init__(
        self,
        strategy: TrainStrategy,
        *,
        mini_batch_size: int,
        micro_batching: MicroBatching,
        max_consecutive_skipped_steps: int,
    ) -> None:
        super().__init__(strategy)
        self._micro_batching = micro_batching
        self._mini_batches = MiniBatches(
            "actor_train",
            mini_batch_size=mini_batch_size,
            num_epochs=1,  # the step loop iterates over the data; here the data is one mini-batch
            max_consecutive_skipped_steps=max_consecutive_skipped_steps,
            seed=0,
            samples_of="the training data (rows counted from 0)",
        )

    @profiled
    def update(self, batch: TrainBatch, step: int, progress: Callable[[int, int], None]) -> dict[str, float]:
        """Take one optimizer step and return its metrics.

        Raises:
            TrainingError: too many consecutive optimizer steps were not finite.
        """
        return summary(self._mini_batches.train(batch, step, self._optimizer_step, progress), "actor")

    def _optimizer_step(self, mini_batch: TrainBatch) -> UpdateResult:
        denominators = Denominators.of(mini_batch.response_mask)

        def loss(scores: TokenScores, micro_batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return sft_loss(scores.log_probs, micro_batch.response_mask, denominators)

        return self._strategy.update(self._micro_batching.split(mini_batch), loss, False)

    def negative_log_likelihood(self, sequences: Sequences) -> tuple[float, int]:
        """Return (sum over imitated tokens in nats, number of these tokens), without gradient."""
        return negative_log_likelihood(self._strategy.score(sequences).log_probs, sequences.response_mask)
