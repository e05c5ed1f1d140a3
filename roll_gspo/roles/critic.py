"""The critic: predicts the return before each token, and is trained on the observed returns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.value_loss import ValueLossSettings, value_loss
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.roles.mini_batches import MiniBatches, summary
from roll_gspo.roles.profiled import profiled
from roll_gspo.roles.trained import TrainedRole
from roll_gspo.strategies.base import UpdateResult, ValueStrategy
from roll_gspo.strategies.micro_batches import MicroBatching


class Critic(TrainedRole[ValueStrategy]):
    """The role `critic`: predicts values and is trained on returns.

    Args:
        strategy: engine that holds the model, its value head and its optimizer.
        loss_settings: settings of the value loss.
        mini_batch_size: samples per optimizer step.
        micro_batching: splits a mini-batch into forward and backward passes.
        num_epochs: passes over a rollout.
        max_consecutive_skipped_steps: number of consecutive non-finite optimizer steps after which training stops.
        seed: seed of the order in which samples form mini-batches.
    """

    def __init__(
        self,
        strategy: ValueStrategy,
        loss_settings: ValueLossSettings,
        *,
        mini_batch_size: int,
        micro_batching: MicroBatching,
        num_epochs: int,
        max_consecutive_skipped_steps: int,
        seed: int,
    ) -> None:
        super().__init__(strategy)
        self._loss_settings = loss_settings
        self._micro_batching = micro_batching
        self._mini_batches = MiniBatches(
            "critic",
            mini_batch_size=mini_batch_size,
            num_epochs=num_epochs,
            max_consecutive_skipped_steps=max_consecutive_skipped_steps,
            seed=seed,
        )

    @profiled
    def values(self, sequences: Sequences) -> Tensor:
        """Return [B, T] float32: the expected return in the state before each response token; 0 where masked."""
        return self._strategy.values(sequences)

    @profiled
    def update(self, batch: TrainBatch, step: int, progress: Callable[[int, int], None]) -> dict[str, float]:
        """Train on a whole rollout with `returns` and return the metrics, averaged over its optimizer steps.

        A mini-batch without a valid token takes no optimizer step and counts in `critic/skipped_updates`.

        Raises:
            TrainingError: too many consecutive optimizer steps were not finite.
        """
        return summary(self._mini_batches.train(batch, step, self._optimizer_step, progress), "critic")

    def _optimizer_step(self, mini_batch: TrainBatch) -> UpdateResult:
        denominators = Denominators.of(mini_batch.response_mask)

        def loss(values: Tensor, micro_batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return value_loss(values, micro_batch, denominators, self._loss_settings)

        return self._strategy.update(self._micro_batching.split(mini_batch), loss)
