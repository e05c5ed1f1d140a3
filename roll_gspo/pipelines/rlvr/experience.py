"""Conversion of scored rollouts into training batches of actor and critic, with metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from roll_gspo.algorithms.advantage import Estimated, advantages
from roll_gspo.algorithms.advantage_estimators import AdvantageSettings, RewardParts
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.ratio_noise import engine_ratio
from roll_gspo.algorithms.routing import expert_difference
from roll_gspo.algorithms.sample_weighting import (
    SampleMaskSettings,
    comparable_samples,
    kept_samples,
    length_quartiles,
    overlong_penalty,
    sample_weights,
    top_entropy_tokens,
)
from roll_gspo.algorithms.staleness import (
    effective_sample_size,
    engine_metrics,
    lag_buckets,
    lag_metrics,
)
from roll_gspo.algorithms.turns import TokenTable, joined_rows
from roll_gspo.algorithms.value_loss import explained_variance
from roll_gspo.batch import Prompt, Rollouts, TrainBatch
from roll_gspo.metrics import mean_of, to_floats
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.credit import turns_of
from roll_gspo.pipelines.rlvr.state import RlvrState


@dataclass(frozen=True)
class ExperienceSettings:
    """Settings that turn a scored rollout into a training batch.

    Attributes:
        advantages: settings of the advantage estimator.
        masks: settings that mask samples from the loss.
        response_length: maximum response length in tokens.
        length_loss_weight, difficulty_loss_weight: weight samples by length, or by the `difficulty` of their row.
        overlong_buffer_length: number of tokens before `response_length` in which the score falls; None disables it.
        overlong_penalty_factor: largest reduction of the score.
        top_entropy_quantile: fraction of the tokens that the policy loss sees, those with the highest entropy.
        part_weights: weight of each part of a weighted sum, by domain; empty unless the estimator normalises parts.
    """

    advantages: AdvantageSettings
    masks: SampleMaskSettings
    response_length: int
    length_loss_weight: bool = False
    difficulty_loss_weight: bool = False
    overlong_buffer_length: int | None = None
    overlong_penalty_factor: float = 1.0
    top_entropy_quantile: float = 1.0
    part_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenScoring:
    """Log-probs, values and routed experts of a rollout's tokens.

    Attributes:
        old_log_probs: log-probs [B, T] of the old policy, the denominator of the ratio.
        ref_log_probs: log-probs [B, T] of the reference, or None.
        values: predictions [B, T] of the critic, or None.
        routed_experts: experts [B, S, L, K] for replay or comparison, or None.
        entropy: entropies [B, T] of the old policy, or None if its log-probs are those of the generation engine.
        lag_buckets: bucket [B, T] int8 of the staleness of each token, or None if no token is stale.
    """

    old_log_probs: Tensor
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None
    routed_experts: Tensor | None = None
    entropy: Tensor | None = None
    lag_buckets: Tensor | None = None


def train_batch(
    collected: Collected,
    scoring: TokenScoring,
    settings: ExperienceSettings,
    state: RlvrState,
    domains: Sequence[str] = (),
) -> tuple[TrainBatch, dict[str, float]]:
    """Build the training batch of a rollout and its metrics. Update the running statistics in `state`.

    Samples whose reward failed are masked from the loss and have advantage 0. Every statistic excludes them. All rows
    of a sample have its advantages. `domains` has the domain of each sample; it is needed with `part_weights`.
    """
    rollouts = collected.rollouts
    valid = collected.valid
    scores, metrics = _shaped_scores(collected, settings)
    parts = reward_parts(collected, scores, domains, settings.part_weights) if settings.part_weights else None
    kept = _kept(collected, settings)
    loss_mask = rollouts.sequences.response_mask & kept[rollouts.samples][:, None]
    controller = state.kl_controller
    kl_coef = controller.kl_coef if controller else 0.0
    estimated = _estimated(collected, scores, scoring, loss_mask, settings, kl_coef, state, parts)
    metrics |= estimated.statistics
    if controller is not None:
        metrics["kl/coef"] = kl_coef
        controller.update(metrics["reward/kl"], int(valid.sum()))
    if scoring.values is not None and estimated.returns is not None:
        mask = rollouts.sequences.response_mask & valid[rollouts.samples][:, None]
        metrics["critic/explained_variance"] = explained_variance(scoring.values, estimated.returns, mask)
    metrics["actor/masked_fraction"] = 1.0 - float(kept.double().mean())
    policy_mask = None
    if settings.top_entropy_quantile < 1 and scoring.entropy is not None:
        policy_mask = top_entropy_tokens(scoring.entropy, loss_mask, settings.top_entropy_quantile)
    weights = _weights(rollouts, kept, settings)
    if weights is not None:
        metrics["actor/sample_weight_max"] = float(weights.max())
    batch = TrainBatch(
        sequences=replace(rollouts.sequences, response_mask=loss_mask),
        sample_ids=rollouts.samples,
        advantages=estimated.advantages,
        old_log_probs=scoring.old_log_probs,
        rollout_log_probs=rollouts.rollout_log_probs,
        ref_log_probs=scoring.ref_log_probs,
        sample_weights=weights,
        values=scoring.values,
        returns=estimated.returns,
        routed_experts=scoring.routed_experts,
        policy_mask=policy_mask,
        length_quartiles=length_quartiles(loss_mask.sum(-1)),
        lag_buckets=scoring.lag_buckets,
    )
    return batch, metrics


def _kept(collected: Collected, settings: ExperienceSettings) -> Tensor:
    """Return a mask [B] bool of the samples that enter the loss."""
    valid, group_ids = collected.valid, collected.rollouts.group_ids
    truncated = torch.tensor([c.finish_reason == "length" for c in collected.rollouts.completions])
    kept = comparable_samples(valid, group_ids) if settings.advantages.compares_groups else valid.clone()
    kept[valid] &= kept_samples(collected.scores[valid], group_ids[valid], truncated[valid], settings.masks)
    return kept


def _estimated(
    collected: Collected,
    scores: Tensor,
    scoring: TokenScoring,
    loss_mask: Tensor,
    settings: ExperienceSettings,
    kl_coef: float,
    state: RlvrState,
    parts: RewardParts | None,
) -> Estimated:
    """Estimate advantages and returns [R, T] from the samples that have a score; both are 0 for the others."""
    valid, rollouts = collected.valid, collected.rollouts
    rows = valid[rollouts.samples]
    mask = rollouts.sequences.response_mask[rows]
    needs_turns = settings.advantages.needs_turns
    table = _joined(rollouts, valid) if needs_turns or len(rows) > len(valid) else None
    turns = None
    if needs_turns:
        scored = [c for c, is_valid in zip(rollouts.completions, valid.tolist(), strict=True) if is_valid]
        turns = turns_of(scored, scores[valid])

    def present(values: Tensor | None) -> Tensor | None:
        if values is None or table is None:
            return values if values is None else values[rows]
        return table.gather(values[rows])

    def restored(values: Tensor) -> Tensor:
        whole = values.new_zeros(len(rows), mask.shape[1])
        whole[rows] = values if table is None else table.spread(values, mask.shape)
        return whole

    estimated = advantages(
        scores[valid],
        rollouts.group_ids[valid],
        mask if table is None else table.mask,
        settings.advantages,
        log_probs=present(scoring.old_log_probs),
        ref_log_probs=present(scoring.ref_log_probs),
        kl_coef=kl_coef,
        running=state.running_moments,
        values=present(scoring.values),
        loss_mask=present(loss_mask),
        parts=None if parts is None else parts._replace(scores=parts.scores[valid]),
        turns=turns,
    )
    returns = None if estimated.returns is None else restored(estimated.returns)
    return Estimated(restored(estimated.advantages), returns, estimated.statistics)


def _joined(rollouts: Rollouts, valid: Tensor) -> TokenTable:
    """Return the sampled tokens of each valid sample in one row, the conversation of the last reward last."""
    rows = valid[rollouts.samples]
    samples = (valid.cumsum(0) - 1)[rollouts.samples[rows]]
    is_own = torch.arange(len(rows))[rows] < len(rollouts)
    return joined_rows(rollouts.sequences.response_mask[rows], samples, (2 * samples + is_own).argsort(stable=True))


def _shaped_scores(collected: Collected, settings: ExperienceSettings) -> tuple[Tensor, dict[str, float]]:
    """Return scores [B], reduced for responses near the length limit, and the metric of the penalty."""
    scores = collected.scores
    if settings.overlong_buffer_length is None:
        return scores, {}
    rollouts = collected.rollouts
    # The limit holds for each conversation and counts given tokens, too.
    lengths = rollouts.sequences.response_lengths
    longest = lengths.new_zeros(len(rollouts)).scatter_reduce(0, rollouts.samples, lengths, "amax")
    penalty = overlong_penalty(
        longest,
        settings.response_length,
        settings.overlong_buffer_length,
        settings.overlong_penalty_factor,
    )
    present = penalty[collected.valid].double()
    return scores + penalty, {"reward/overlong_penalty": float(present.sum() / max(len(present), 1))}


def reward_parts(
    collected: Collected, scores: Tensor, domains: Sequence[str], part_weights: Mapping[str, Mapping[str, float]]
) -> RewardParts:
    """Return the parts of each score, one column per domain and part.

    A domain without a weighted sum has its score as its only part. What changes a score afterwards (the overlong
    penalty) is one more part of weight 1.
    """
    columns = {(domain, part): weight for domain, parts in part_weights.items() for part, weight in parts.items()}
    single = sorted(set(domains) - set(part_weights))
    columns |= {(domain, ""): 1.0 for domain in single} | {("", ""): 1.0}
    table = torch.zeros(len(domains), len(columns), dtype=torch.float64)
    penalties = scores.double() - collected.scores.double()
    for row, (domain, result) in enumerate(zip(domains, collected.results, strict=True)):
        for column, (of_domain, part) in enumerate(columns):
            if of_domain == domain and result.failed is None:
                table[row, column] = result.components[part] if part else result.score
    table[:, -1] = penalties
    return RewardParts(table, torch.tensor(list(columns.values()), dtype=torch.float64))


def _weights(rollouts: Rollouts, kept: Tensor, settings: ExperienceSettings) -> Tensor | None:
    if not settings.length_loss_weight and not settings.difficulty_loss_weight:
        return None
    return sample_weights(
        rollouts.sequences.response_mask.sum(-1),
        difficulties(rollouts.prompts)[rollouts.samples] if settings.difficulty_loss_weight else None,
        kept[rollouts.samples],
        length_loss_weight=settings.length_loss_weight,
        difficulty_loss_weight=settings.difficulty_loss_weight,
    )


def difficulties(prompts: Sequence[Prompt]) -> Tensor:
    """Return the `difficulty` [B] float32 of each row. The check at startup ensures that every row has one."""
    return torch.tensor([float(prompt.row["difficulty"]) for prompt in prompts])


def staleness(rollouts: Rollouts, version: int, max_lag: int = 0) -> tuple[Tensor | None, dict[str, float]]:
    """Return the bucket [B, T] int8 of each token's lag, and the distribution of the lags.

    Without a stale token, and with `max_lag` 0, there are neither.

    Args:
        rollouts: the samples.
        version: version of the trainer's weights before the update.
        max_lag: largest lag that the configuration allows.
    """
    mask = rollouts.sequences.response_mask
    lags = version - rollouts.versions
    if max_lag == 0 and not bool((lags[mask] > 0).any()):
        return None, {}
    return lag_buckets(lags), lag_metrics(lags, mask, max_lag)


def mismatch(
    rollouts: Rollouts, old_log_probs: Tensor, buckets: Tensor | None = None, level: str = "sequence"
) -> dict[str, float]:
    """Return the metrics of the difference between trainer and generation engine on the same tokens.

    Args:
        rollouts: the samples.
        old_log_probs: log-probs [B, T] of the trainer before the update.
        buckets: bucket [B, T] int8 of each token's lag; None if no token is stale.
        level: level of the weights of the effective sample size.
    """
    policies = old_log_probs, rollouts.rollout_log_probs
    return to_floats(engine_metrics(*policies, rollouts.sequences.response_mask, buckets, level))


def ratio_mismatch(
    rollouts: Rollouts, old_log_probs: Tensor, buckets: Tensor | None, settings: PolicyLossSettings
) -> dict[str, float]:
    """Return `mismatch/ratio_rms` of a rollout: the ratio of trainer over generation engine at equal weights."""
    compared = old_log_probs, rollouts.rollout_log_probs, rollouts.sequences.response_mask, buckets
    return to_floats(engine_ratio(*compared, settings))


def rollout_ess(rollouts: Rollouts, old_log_probs: Tensor, level: str) -> dict[str, float]:
    """Return the effective sample size of a rollout that the staleness gate checks."""
    policies = old_log_probs, rollouts.rollout_log_probs
    return to_floats({"staleness/ess": effective_sample_size(*policies, rollouts.sequences.response_mask, level)})


def entropy_metrics(rollouts: Rollouts, entropy: Tensor | None) -> dict[str, float]:
    """Return the mean of `entropy` [B, T] over response tokens; empty if `entropy` is None."""
    if entropy is None:
        return {}
    return to_floats({"actor/entropy": mean_of(entropy, rollouts.sequences.response_mask)})


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Return length and truncation metrics of the samples that the step trains on."""
    counts = rollouts.sequences.response_mask.sum(-1)
    lengths = counts.new_zeros(len(rollouts)).index_add(0, rollouts.samples, counts)
    prompt_lengths = rollouts.sequences.prompt_lengths[: len(rollouts)]
    truncated = sum(c.finish_reason == "length" for c in rollouts.completions)
    return {
        "rollout/response_length_mean": float(lengths.double().mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/response_length_min": float(lengths.min()),
        "rollout/prompt_length_mean": float(prompt_lengths.double().mean()),
        "rollout/truncated_fraction": truncated / len(rollouts),
        "rollout/weights_version": float(rollouts.weights_version),
    }


def routing_metrics(rollouts: Rollouts, routed_experts: Tensor | None) -> dict[str, float]:
    """Return the difference between trainer and engine experts [B, S, L, K]; empty unless both are known."""
    if routed_experts is None or rollouts.routed_experts is None:
        return {}
    positions = rollouts.sequences.predicting_mask
    difference = expert_difference(routed_experts, rollouts.routed_experts, positions)
    return to_floats({"routing/rollout_mismatch": difference})
