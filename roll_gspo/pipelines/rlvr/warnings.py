"""Warnings of the plan about the algorithm, the sampling and the rewards."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.declarations import RATIOS

TOKEN_SCALE_CLIP = 0.01  # token ratios vary by tenths, sequence ratios by thousandths


def rlvr_warnings(config: ExperimentConfig) -> Iterator[Problem]:
    """Yield settings that run but are probably not intended, each with its fix."""
    yield from _one_update(config)
    yield from _length_weighting(config)
    yield from _clip_scale(config)
    yield from _truncated_sampling(config)
    yield from _rewards(config)
    yield from _parts(config)
    yield from _whitening(config)


def _one_update(config: ExperimentConfig) -> Iterator[Problem]:
    if config.updates_per_rollout > 1:
        return
    key, value = "gradient_accumulation_steps", config.actor_train.training_args.gradient_accumulation_steps
    effect = "old and current policy are the same: the ratio is 1, and clip and importance_sampling have no effect"
    if not config.enable_old_logprobs_recompute:
        effect = "with enable_old_logprobs_recompute: false the ratio measures trainer against engine, not the update"
    message = f"{value} gives one optimizer step per rollout; {effect}; lower it"
    yield Problem(f"actor_train.training_args.{key}", message)


def _length_weighting(config: ExperimentConfig) -> Iterator[Problem]:
    scale = RATIOS.declaration(config.importance_sampling).scale
    if scale == "sequence" and config.loss_agg_mode != "seq-mean-token-mean":
        yield Problem(
            "loss_agg_mode",
            f"{config.loss_agg_mode} weights sequences by length, unlike the GSPO paper (LUSPO and ROLL's page of "
            "August 2025 do, with seq-mean-token-sum); the paper's is seq-mean-token-mean",
        )


def _clip_scale(config: ExperimentConfig) -> Iterator[Problem]:
    if config.clip_range is None or config.pg_clip_length_scaling:
        return
    widest, level = max(config.clip_range), config.importance_sampling
    scale = RATIOS.declaration(level).scale
    if scale == "sequence" and widest > TOKEN_SCALE_CLIP:
        yield Problem(
            "importance_sampling",
            f"{level} with the clip range {config.clip_range} never clips, because sequence ratios hardly leave [0.99, "
            "1.01]; the paper's is 3e-4/4e-4 (use_pg_clip_range: true, pg_clip_low: 3e-4, pg_clip_high: 4e-4)",
        )
    if scale == "token" and widest < TOKEN_SCALE_CLIP:
        yield Problem(
            "importance_sampling",
            f"{level} with the clip range {config.clip_range} clips nearly every token; 0.2/0.27 is usual",
        )


def _truncated_sampling(config: ExperimentConfig) -> Iterator[Problem]:
    sampling = config.actor_infer.generating_args
    if sampling.top_p == 1 and sampling.top_k <= 0:
        return
    key, value = ("top_p", f"{sampling.top_p:g}") if sampling.top_p != 1 else ("top_k", str(sampling.top_k))
    key = f"actor_infer.generating_args.{key}"
    reason = "the engine's log-probs are of the truncated distribution, the trainer's are not, which biases the"
    if not config.enable_old_logprobs_recompute:
        message = f"{value} with enable_old_logprobs_recompute: false: {reason} ratio; set top_p: 1, top_k: 0"
        yield Problem(key, message)
    if config.train_infer_correction is not None:
        message = f"{value} with train_infer_correction: {reason} weights; set top_p: 1, top_k: 0"
        yield Problem(key, message)


def _rewards(config: ExperimentConfig) -> Iterator[Problem]:
    if config.reward_scale and config.reward_clip is None:
        samples = {"group": "a prompt", "batch": "a rollout", "running": "the run"}[str(config.reward_norm)]
        yield Problem(
            "reward_scale",
            f"true with reward_norm: {config.reward_norm} and no reward_clip: if all scores of {samples} are equal, "
            "their deviation is 0 and a reward of 1 becomes 1e6; set reward_clip: 10",
        )
    if config.adv_estimator == "dr_grpo" and config.reward_norm == "group" and not config.reward_shift:
        yield Problem(
            "adv_estimator",
            "dr_grpo with reward_norm: group is grpo: rewards are divided by the deviation of their group, which Dr. "
            "GRPO does not do; set reward_norm=none",
        )


def _parts(config: ExperimentConfig) -> Iterator[Problem]:
    if config.adv_estimator == "gdpo" and not any(b.combine == "weighted_sum" for b in config.rewards.values()):
        yield Problem(
            "adv_estimator",
            "gdpo without combine: weighted_sum in rewards normalises the only score over its group and then over the "
            "rollout; give a block of rewards several parts, or set grpo",
        )


def _whitening(config: ExperimentConfig) -> Iterator[Problem]:
    if not config.whiten_advantages:
        return
    if config.adv_estimator == "raft_plus_plus":
        yield Problem(
            "whiten_advantages",
            "true with adv_estimator: raft_plus_plus gives excluded samples (advantage 0) a negative advantage; set it "
            "to false",
        )
    if config.policy_loss == "topr":
        yield Problem(
            "whiten_advantages",
            "true with policy_loss: topr changes the sign of advantages, which selects the half of TOPR; set it to "
            "false",
        )
