"""From judged rollouts to what the actor trains on, with the metrics of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roll_gspo.algorithms.advantage import AdvantageSettings, advantages
from roll_gspo.algorithms.correction import mismatch_metrics
from roll_gspo.algorithms.kl import KLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Rollouts, TrainBatch
from roll_gspo.metrics import mean_of, to_floats
from roll_gspo.rewards.base import RewardResult


def train_batch(
    rollouts: Rollouts,
    scores: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None,
    settings: AdvantageSettings,
    kl_controller: KLController | None,
    running: RunningMoments,
) -> tuple[TrainBatch, dict[str, float]]:
    """Advantages of a rollout, and the batch that carries them.

    Args:
        scores: [B] float32 of the reward workers.
        old_log_probs: [B, T] of the policy that the ratio is taken against.
        ref_log_probs: [B, T] of the reference, or None.
        kl_controller: of the token-level KL, or None where it is off; it is told this rollout's KL.
        running: moments of all scores so far, for `reward_norm: running`.
    """
    mask = rollouts.sequences.response_mask
    kl_coef = kl_controller.kl_coef if kl_controller else 0.0
    values, metrics = advantages(
        scores,
        rollouts.group_ids,
        mask,
        settings,
        log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        kl_coef=kl_coef,
        running=running,
    )
    if kl_controller is not None:
        metrics["kl/coef"] = kl_coef
        kl_controller.update(metrics["reward/kl"], len(rollouts))
    batch = TrainBatch(
        sequences=rollouts.sequences,
        sample_ids=torch.arange(len(rollouts)),
        advantages=values,
        old_log_probs=old_log_probs,
        rollout_log_probs=rollouts.rollout_log_probs,
        ref_log_probs=ref_log_probs,
    )
    return batch, metrics


def mismatch(rollouts: Rollouts, old_log_probs: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs are from the generation engine's on the same tokens and weights."""
    return to_floats(mismatch_metrics(old_log_probs, rollouts.rollout_log_probs, rollouts.sequences.response_mask))


def entropy_metrics(rollouts: Rollouts, entropy: Tensor | None) -> dict[str, float]:
    """Mean entropy of the policy over the rollout's response tokens; `entropy` [B, T]."""
    if entropy is None:
        return {}
    return to_floats({"actor/entropy": mean_of(entropy, rollouts.sequences.response_mask)})


def rollout_metrics(rollouts: Rollouts, results: Sequence[RewardResult]) -> dict[str, float]:
    """Lengths, truncation and failed rewards of a rollout."""
    lengths = rollouts.sequences.response_mask.sum(-1)
    truncated = sum(c.finish_reason == "length" for c in rollouts.completions)
    return {
        "rollout/response_length_mean": float(lengths.double().mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/response_length_min": float(lengths.min()),
        "rollout/prompt_length_mean": float(rollouts.sequences.prompt_lengths.double().mean()),
        "rollout/truncated_fraction": truncated / len(rollouts),
        "rollout/num_tokens": float(lengths.sum()),
        "rollout/weights_version": float(rollouts.weights_version),
        "reward/failed": float(sum(r.failed is not None for r in results)),
    }
