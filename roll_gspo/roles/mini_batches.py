"""Mini-batches and epochs of optimizer steps on one rollout, and what is done about those that are skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from roll_gspo.batch import TrainBatch
from roll_gspo.errors import TrainingError
from roll_gspo.metrics import Metric, merge, to_floats
from roll_gspo.strategies.base import UpdateResult

logger = logging.getLogger(__name__)


class MiniBatches:
    """Takes optimizer steps on the mini-batches of a rollout.

    Args:
        role: whose; its name in the configuration, for messages.
        mini_batch_size: samples of one optimizer step.
        num_epochs: passes over a rollout.
        max_consecutive_skipped_steps: stop after this many non-finite optimizer steps in a row.
        seed: of the order in which samples form mini-batches.
        samples_of: where `sample_ids` are found, for messages; `{step}` stands for the step.
    """

    def __init__(
        self,
        role: str,
        *,
        mini_batch_size: int,
        num_epochs: int,
        max_consecutive_skipped_steps: int,
        seed: int,
        samples_of: str = "rollouts/step_{step:06d}.jsonl",
    ) -> None:
        self._role = role
        self._size = mini_batch_size
        self._num_epochs = num_epochs
        self._max_skipped = max_consecutive_skipped_steps
        self._skipped_in_a_row = 0
        self._seed = seed
        self._samples_of = samples_of

    def train(
        self,
        batch: TrainBatch,
        step: int,
        optimizer_step: Callable[[TrainBatch], UpdateResult],
        progress: Callable[[int, int], None],
    ) -> list[UpdateResult | None]:
        """An optimizer step on each mini-batch; None where it held no valid token and so no step was taken.

        Raises:
            TrainingError: too many optimizer steps in a row were not finite.
        """
        mini_batches = list(self.indices(batch, step))
        results: list[UpdateResult | None] = []
        for number, index in enumerate(mini_batches, start=1):
            mini_batch = batch.rows(index)
            if bool(mini_batch.response_mask.any()):
                result = optimizer_step(mini_batch)
                self._note_if_skipped(result, mini_batch, step)
                results.append(result)
            else:  # a step would move the weights by momentum and decay alone
                logger.warning(
                    "step %d: %s: no optimizer step, all %d samples are masked", step, self._role, len(index)
                )
                results.append(None)
            progress(number, len(mini_batches))
        return results

    def indices(self, batch: TrainBatch, step: int) -> Iterator[Tensor]:
        """Which samples form each mini-batch of each epoch."""
        lengths = batch.sequences.lengths
        for epoch in range(self._num_epochs):
            # One generator per (seed, step, epoch): a resumed run draws the same mini-batches.
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * 1_009 + epoch)
            for index in torch.randperm(len(batch), generator=generator).split(self._size):
                # Which samples meet in an optimizer step is random; those of like length share a micro-batch.
                yield index[lengths[index].argsort(stable=True)]

    def _note_if_skipped(self, result: UpdateResult, mini_batch: TrainBatch, step: int) -> None:
        if result.applied:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        logger.warning(
            "step %d: optimizer step skipped, %s has loss %g and gradient norm %g; samples %s of %s",
            step,
            self._role,
            result.loss,
            result.grad_norm,
            mini_batch.sample_ids.tolist(),
            self._samples_of.format(step=step),
        )
        if self._skipped_in_a_row >= self._max_skipped:
            raise TrainingError(
                f"step {step}: {self._role}: {self._skipped_in_a_row} optimizer steps in a row were not finite (last "
                f"loss {result.loss:g}, gradient norm {result.grad_norm:g}); lower "
                f"{self._role}.training_args.learning_rate, or raise max_consecutive_skipped_steps"
            )


def summary(results: Sequence[UpdateResult | None], prefix: str) -> dict[str, float]:
    """Metrics of the loss function as means over optimizer steps, and `prefix/{grad_norm,lr,num_updates,...}`.

    Only counts where no mini-batch held a valid token.
    """
    computed = [result for result in results if result is not None]
    num_updates = sum(result.applied for result in computed)
    metrics = {
        f"{prefix}/num_updates": float(num_updates),
        f"{prefix}/skipped_updates": float(len(results) - num_updates),
    }
    if computed:
        metrics |= to_floats(merge(_mean_over_updates(result) for result in computed))
        metrics[f"{prefix}/grad_norm"] = sum(result.grad_norm for result in computed) / len(computed)
        metrics[f"{prefix}/lr"] = computed[-1].learning_rate
    return metrics


def _mean_over_updates(result: UpdateResult) -> dict[str, Metric]:
    """Shares of one mini-batch's loss sum up to it; over mini-batches it is a mean."""
    one = torch.ones(())
    return {name: Metric(m.value, one, "mean") if m.reduction == "sum" else m for name, m in result.metrics.items()}
