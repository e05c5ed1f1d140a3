"""Warnings of the plan about the algorithm, the sampling and the rewards."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.declarations import RATIOS

TOKEN_SCALE_CLIP = 0.01  # token ratios vary by tenths, sequence ratios by thousandths


def rlvr_warnings(config: ExperimentConfig) -> Iterator[str]:
    """Yield settings that run but are probably not intended, each with its fix."""
    yield from _of_one_update(config)
    yield from _of_length_weighting(config)
    yield from _of_clip_scale(config)
    yield from _of_truncated_sampling(config)
    yield from _of_rewards(config)
    yield from _of_whitening(config)


def _of_one_update(config: ExperimentConfig) -> Iterator[str]:
    if config.updates_per_rollout > 1:
        return
    way_out = "lower actor_train.training_args.gradient_accumulation_steps"
    if config.enable_old_logprobs_recompute:
        yield (
            "one optimizer step per rollout: old and current policy are the same, the ratio is 1 and neither clip nor "
            f"importance_sampling does anything; {way_out}"
        )
    else:
        yield (
            "one optimizer step per rollout with enable_old_logprobs_recompute: false: the ratio says how far trainer "
            f"and engine differ, not how far the policy moved; {way_out}"
        )


def _of_length_weighting(config: ExperimentConfig) -> Iterator[str]:
    scale = RATIOS.declaration(config.importance_sampling).scale
    if scale == "sequence" and config.loss_agg_mode != "seq-mean-token-mean":
        yield (
            f"loss_agg_mode: {config.loss_agg_mode} weighs sequences by length, the GSPO paper does not (LUSPO does, "
            "with seq-mean-token-sum); loss_agg_mode=seq-mean-token-mean is the paper's"
        )


def _of_clip_scale(config: ExperimentConfig) -> Iterator[str]:
    if config.clip_range is None:
        return
    widest, level = max(config.clip_range), config.importance_sampling
    scale = RATIOS.declaration(level).scale
    if scale == "sequence" and widest > TOKEN_SCALE_CLIP:
        yield (
            f"importance_sampling: {level} with the clip range {config.clip_range}: sequence "
            "ratios hardly leave [0.99, 1.01], so it never clips; the paper's is 3e-4/4e-4 "
            "(use_pg_clip_range: true, pg_clip_low: 3e-4, pg_clip_high: 4e-4)"
        )
    if scale == "token" and widest < TOKEN_SCALE_CLIP:
        yield (
            f"importance_sampling: {level} with the clip range {config.clip_range}: token ratios leave it at once and "
            "nearly every token is clipped; 0.2/0.27 is usual"
        )


def _of_truncated_sampling(config: ExperimentConfig) -> Iterator[str]:
    sampling = config.actor_infer.generating_args
    if sampling.top_p == 1 and sampling.top_k <= 0:
        return
    reason = "the engine's log-probs are of the truncated distribution, the trainer's are not, which biases the"
    if not config.enable_old_logprobs_recompute:
        yield f"top_p/top_k with enable_old_logprobs_recompute: false: {reason} ratio; set top_p: 1, top_k: 0"
    if config.train_infer_correction is not None:
        yield (
            f"top_p/top_k with train_infer_correction: {reason} weights by the mass that was cut off; set top_p: 1, "
            "top_k: 0"
        )


def _of_rewards(config: ExperimentConfig) -> Iterator[str]:
    if config.reward_scale and config.reward_clip is None:
        samples = {"group": "a prompt", "batch": "a rollout", "running": "the run so far"}[str(config.reward_norm)]
        yield (
            f"reward_scale: true with reward_norm: {config.reward_norm} and no reward_clip: where all scores of "
            f"{samples} are the same, their deviation is 0 and a reward of 1 becomes 1e6; set reward_clip: 10"
        )
    if config.adv_estimator == "dr_grpo" and config.reward_norm == "group" and not config.reward_shift:
        yield (
            "adv_estimator: dr_grpo with reward_norm: group: rewards are divided by the deviation of their group, "
            "which Dr. GRPO leaves out (this is grpo); set reward_norm=none"
        )


def _of_whitening(config: ExperimentConfig) -> Iterator[str]:
    if not config.whiten_advantages:
        return
    if config.adv_estimator == "raft_plus_plus":
        yield (
            "whiten_advantages: true with adv_estimator: raft_plus_plus: samples that were to be left out (advantage "
            "0) get a negative advantage and are trained against; set whiten_advantages: false"
        )
    if config.policy_loss == "topr":
        yield (
            "whiten_advantages: true with policy_loss: topr: the sign of an advantage decides which half of TOPR a "
            "sample belongs to, and whitening moves it; set whiten_advantages: false"
        )
