"""The trained policy: policy updates in mini-batches and epochs on one rollout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import policy_loss
from roll_gspo.algorithms.ratio_noise import engine_ratio, ratio_rms
from roll_gspo.algorithms.staleness import engine_metrics
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.roles.mini_batches import MiniBatches, summary
from roll_gspo.roles.profiled import profiled
from roll_gspo.roles.trained import TrainedPolicy
from roll_gspo.roles.weight_export import BuildNativeSender, WeightExport
from roll_gspo.strategies.base import AdapterStrategy, TokenScores, TrainStrategy, UpdateResult, WeightSource
from roll_gspo.strategies.micro_batches import MicroBatching
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress


class Actor(TrainedPolicy):
    """The role `actor_train`: scores tokens and trains the policy.

    Args:
        strategy: engine that holds the model and its optimizer.
        loss_settings: settings of the policy loss.
        mini_batch_size: samples per optimizer step.
        micro_batching: splits a mini-batch into forward and backward passes.
        num_epochs: passes over a rollout.
        max_consecutive_skipped_steps: number of consecutive non-finite optimizer steps after which training stops.
        seed: seed of the order in which samples form mini-batches.
        measure_mismatch: old log-probs are those of the generation engine. The first mini-batch of each update, whose
            policy has not moved yet, then reports `mismatch/*` and `staleness/*`. If they are recomputed by the
            trainer, that pass measures the whole rollout, and the first mini-batch reports `actor/ratio_noise`.
        build_weight_sender: builds the sender of a weight transfer between GPUs; None if the generation engine has
            none.
    """

    def __init__(
        self,
        strategy: TrainStrategy,
        loss_settings: PolicyLossSettings,
        *,
        mini_batch_size: int,
        micro_batching: MicroBatching,
        num_epochs: int,
        max_consecutive_skipped_steps: int,
        seed: int,
        measure_mismatch: bool = False,
        build_weight_sender: BuildNativeSender | None = None,
    ) -> None:
        super().__init__(strategy)
        self._loss_settings = loss_settings
        self._micro_batching = micro_batching
        self._measure_mismatch = measure_mismatch
        self._export = WeightExport(strategy, build_weight_sender)
        self._mini_batches = MiniBatches(
            "actor_train",
            mini_batch_size=mini_batch_size,
            num_epochs=num_epochs,
            max_consecutive_skipped_steps=max_consecutive_skipped_steps,
            seed=seed,
        )

    @profiled
    def score(self, sequences: Sequences) -> TokenScores:
        """Return log-probs of the response tokens under the current policy, and the entropies."""
        return self._strategy.score(sequences, entropy=True)

    @profiled
    def base_log_probs(self, sequences: Sequences) -> Tensor:
        """Return [B, T] log-probs of the response tokens under the policy without its adapter."""
        if not isinstance(self._strategy, AdapterStrategy):
            raise TypeError(f"{type(self._strategy).__name__}: supports_lora needs an AdapterStrategy")
        return self._strategy.score_base(sequences).log_probs

    @profiled
    def update(self, batch: TrainBatch, step: int, progress: Callable[[int, int], None]) -> dict[str, float]:
        """Train on a whole rollout and return the metrics, averaged over its optimizer steps.

        A mini-batch without a valid token takes no optimizer step and counts in `actor/skipped_updates`.

        Raises:
            TrainingError: too many consecutive optimizer steps were not finite.
        """
        is_first = True

        def optimizer_step(mini_batch: TrainBatch) -> UpdateResult:
            nonlocal is_first
            is_first, unmoved = False, is_first
            return self._optimizer_step(mini_batch, unmoved)

        return summary(self._mini_batches.train(batch, step, optimizer_step, progress), "actor")

    def _optimizer_step(self, mini_batch: TrainBatch, unmoved: bool) -> UpdateResult:
        """Take one optimizer step. If the policy is `unmoved` since the old log-probs, measure their difference."""
        denominators, policy_denominators = Denominators.of(mini_batch.response_mask), None
        if mini_batch.policy_mask is not None:
            policy_denominators = Denominators.of(mini_batch.policy_mask & mini_batch.response_mask)

        def loss(scores: TokenScores, micro_batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
            share, metrics = policy_loss(
                *(scores.log_probs, scores.entropy, micro_batch, denominators, self._loss_settings, policy_denominators)
            )
            if unmoved:
                metrics |= self._unmoved_metrics(scores.log_probs.detach(), micro_batch)
            return share, metrics

        wants_entropy = self._loss_settings.entropy_loss_coef != 0
        return self._strategy.update(self._micro_batching.split(mini_batch), loss, wants_entropy)

    def _unmoved_metrics(self, log_probs: Tensor, batch: TrainBatch) -> dict[str, Metric]:
        """Return how the policy of the update differs from the old one before it has moved."""
        mask, settings = batch.response_mask, self._loss_settings
        if not self._measure_mismatch:
            return {"actor/ratio_noise": ratio_rms(log_probs, batch.old_log_probs, mask, settings)}
        compared = log_probs, batch.rollout_log_probs, mask, batch.lag_buckets
        return engine_metrics(*compared, "sequence") | engine_ratio(*compared, settings)

    def weights(self) -> WeightSource:
        """Return the live weights for the generation engine."""
        return self._strategy.weights()

    def open_broadcast(
        self, address: WeightBroadcastAddress, bucket_bytes: int | None = None, checksum: bool = False
    ) -> WeightBroadcastAddress:
        """Open a weight transfer to generation engines in other processes, on rank 0; see `WeightExport.open`."""
        return self._export.open(address, bucket_bytes, checksum)

    def join_broadcast(self, address: WeightBroadcastAddress, bucket_bytes: int | None = None) -> None:
        """Join the opened transfer, on every rank; see `WeightExport.join`."""
        self._export.join(address, bucket_bytes)

    def send_weights(self, version: int) -> None:
        """Send the live weights, on every rank; see `WeightExport.send`."""
        self._export.send(version)
