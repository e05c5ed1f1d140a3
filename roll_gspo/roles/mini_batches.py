"""Mini-batches and epochs of optimizer steps on one rollout, and the handling of skipped steps."""

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
    """Take optimizer steps on the mini-batches of a rollout.

    Args:
        role: name of the trained role in the configuration, for messages.
        mini_batch_size: samples per optimizer step.
        num_epochs: passes over a rollout.
        max_consecutive_skipped_steps: number of consecutive non-finite optimizer steps after which training stops.
        seed: seed of the order in which samples form mini-batches.
        samples_of: file in which messages look up `sample_ids`; `{step}` is replaced by the step.
    """

    def __init__(
        self,
        role: str,
        *,
        mini_batch_size: int,
        num_epochs: int,
        max_consecutive_skipped_steps: int,
        seed: int,
        samples_of: str = "rollouts/step_{step:06d}.parquet",
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
        """Take an optimizer step per mini-batch; the result of a mini-batch without a valid token is None.

        Raises:
            TrainingError: too many consecutive optimizer steps were not finite.
        """
        mini_batches = list(self.indices(batch, step))
        results: list[UpdateResult | None] = []
        for number, index in enumerate(mini_batches, start=1):
            mini_batch = batch.rows(index)
            if bool(mini_batch.response_mask.any()):
                result = optimizer_step(mini_batch)
                self._note_if_skipped(result, mini_batch, step)
                results.append(result)
            else:  # an optimizer step would change the weights by momentum and weight decay only
                logger.warning(
                    "step %d: %s: no optimizer step, all %d samples are masked", step, self._role, len(index)
                )
                results.append(None)
            progress(number, len(mini_batches))
        return results

    def indices(self, batch: TrainBatch, step: int) -> Iterator[Tensor]:
        """Yield the rows of each mini-batch of each epoch: those of `mini_batch_size` samples."""
        lengths = batch.sequences.lengths
        of_sample: dict[int, list[int]] = {}
        for row, sample in enumerate(batch.sample_ids.tolist()):
            of_sample.setdefault(sample, []).append(row)
        rows = list(of_sample.values())
        for epoch in range(self._num_epochs):
            # One generator per (seed, step, epoch): a resumed run draws the same mini-batches.
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * 1_009 + epoch)
            for chosen in torch.randperm(len(rows), generator=generator).split(self._size):
                index = torch.tensor([row for sample in chosen.tolist() for row in rows[sample]])
                # Samples of an optimizer step are random. Within it, samples of similar length share a micro-batch.
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
    """Return means of the loss metrics over optimizer steps, and `prefix/{grad_norm,lr,num_updates,...}`.

    Return only the counts if no mini-batch held a valid token.
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
    """Average a metric over mini-batches. Shares within one mini-batch are already summed."""
    one = torch.ones(())
    return {name: Metric(m.value, one, "mean") if m.reduction == "sum" else m for name, m in result.metrics.items()}
