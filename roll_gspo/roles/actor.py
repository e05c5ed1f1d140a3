"""The policy that is trained: mini-batches and epochs of policy updates on one rollout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.policy_loss import PolicyLossSettings, policy_loss
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.metrics import Metric, merge, to_floats
from roll_gspo.strategies.base import TokenScores, TrainStrategy, UpdateResult, WeightSource

logger = logging.getLogger(__name__)


class Actor:
    """`actor_train`.

    Args:
        strategy: the engine that holds the model and its optimizer.
        loss_settings: the policy loss.
        mini_batch_size: samples of one optimizer step.
        micro_batch_size: samples of one forward and backward pass.
        num_epochs: passes over a rollout.
        max_consecutive_skipped_steps: stop after this many non-finite optimizer steps in a row.
        seed: of the order in which samples form mini-batches.
    """

    def __init__(
        self,
        strategy: TrainStrategy,
        loss_settings: PolicyLossSettings,
        *,
        mini_batch_size: int,
        micro_batch_size: int,
        num_epochs: int,
        max_consecutive_skipped_steps: int,
        seed: int,
    ) -> None:
        self._strategy = strategy
        self._loss_settings = loss_settings
        self._mini_batch_size = mini_batch_size
        self._micro_batch_size = micro_batch_size
        self._num_epochs = num_epochs
        self._max_skipped = max_consecutive_skipped_steps
        self._skipped_in_a_row = 0
        self._seed = seed

    def score(self, sequences: Sequences) -> TokenScores:
        """Log-probabilities of the response tokens under the current policy, and its entropies."""
        return self._strategy.score(sequences, entropy=True)

    def update(self, batch: TrainBatch, step: int, progress: Callable[[int, int], None]) -> dict[str, float]:
        """Train on a whole rollout; returns the metrics, averaged over its optimizer steps.

        Raises:
            TrainingError: too many optimizer steps in a row were not finite.
        """
        mini_batches = list(self._mini_batches(batch, step))
        results = []
        for number, index in enumerate(mini_batches, start=1):
            mini_batch = batch.rows(index)
            result = self._optimizer_step(mini_batch)
            self._note_if_skipped(result, mini_batch, step)
            results.append(result)
            progress(number, len(mini_batches))
        return _summary(results)

    def _mini_batches(self, batch: TrainBatch, step: int) -> Iterator[Tensor]:
        lengths = batch.sequences.lengths
        for epoch in range(self._num_epochs):
            # A generator of its own for each (seed, step, epoch): a resumed run draws the same mini-batches.
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * 1_009 + epoch)
            for index in torch.randperm(len(batch), generator=generator).split(self._mini_batch_size):
                # Which samples meet in an optimizer step is random; those of like length share a micro-batch.
                yield index[lengths[index].argsort(stable=True)]

    def _optimizer_step(self, mini_batch: TrainBatch) -> UpdateResult:
        denominators = Denominators.of(mini_batch.response_mask)

        def loss(scores: TokenScores, micro_batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            return policy_loss(scores.log_probs, scores.entropy, micro_batch, denominators, self._loss_settings)

        wants_entropy = self._loss_settings.entropy_loss_coef != 0
        return self._strategy.update(mini_batch.split(self._micro_batch_size), loss, wants_entropy)

    def _note_if_skipped(self, result: UpdateResult, mini_batch: TrainBatch, step: int) -> None:
        if result.applied:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        logger.warning(
            "step %d: optimizer step skipped, loss %g and gradient norm %g; samples %s of rollouts/step_%06d.jsonl",
            step,
            result.loss,
            result.grad_norm,
            mini_batch.sample_ids.tolist(),
            step,
        )
        if self._skipped_in_a_row >= self._max_skipped:
            raise TrainingError(
                f"step {step}: {self._skipped_in_a_row} optimizer steps in a row were not finite (last loss "
                f"{result.loss:g}, gradient norm {result.grad_norm:g}); lower learning_rate, or raise "
                "max_consecutive_skipped_steps"
            )

    def weights(self) -> WeightSource:
        """The live weights, for the generation engine."""
        return self._strategy.weights()

    def save(self, folder: Path) -> None:
        """Write the training state into an existing folder."""
        self._strategy.save(folder)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        self._strategy.load(folder)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout."""
        self._strategy.save_hf(folder)

    def close(self) -> None:
        """The engine lives as long as the process."""


def _summary(results: Iterable[UpdateResult]) -> dict[str, float]:
    results = list(results)
    metrics = to_floats(merge(_mean_over_updates(r) for r in results))
    metrics["actor/grad_norm"] = sum(r.grad_norm for r in results) / len(results)
    metrics["actor/lr"] = results[-1].learning_rate
    metrics["actor/num_updates"] = float(sum(r.applied for r in results))
    metrics["actor/skipped_updates"] = float(sum(not r.applied for r in results))
    return metrics


def _mean_over_updates(result: UpdateResult) -> dict[str, Metric]:
    """Shares of one mini-batch's loss sum up to it; over mini-batches it is a mean."""
    one = torch.ones(())
    return {name: Metric(m.value, one, "mean") if m.reduction == "sum" else m for name, m in result.metrics.items()}
