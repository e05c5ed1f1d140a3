"""Settings that run but are probably not what was meant: the warnings of the plan, each with its reason and way out."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Schema
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.run import RunConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.pipelines.devices import devices_of, devices_per_node, roles_of

RAY_ONLY = ("worker_timeout_s", "max_worker_restarts", "max_restarts", "num_nodes", "weight_transfer")
TOKEN_SCALE_CLIP = 0.01  # ratios of single tokens move by tenths, those of sequences by thousandths


def warnings_of(config: AnyConfig) -> tuple[str, ...]:
    """What to beware of in a valid configuration; each text begins with what it is about."""
    if isinstance(config, SftConfig):
        return tuple(_of_execution(config))
    return (
        *_of_one_update(config),
        *_of_length_weighting(config),
        *_of_clip_scale(config),
        *_of_truncated_sampling(config),
        *_of_rewards(config),
        *_of_whitening(config),
        *_of_execution(config),
    )


def _of_one_update(config: ExperimentConfig) -> Iterator[str]:
    if config.updates_per_rollout > 1:
        return
    way_out = "lower actor_train.training_args.gradient_accumulation_steps"
    if config.enable_old_logprobs_recompute:
        yield (
            "one optimizer step a rollout: old and current policy are the same, the ratio is 1 and neither clip nor "
            f"importance_sampling does anything; {way_out}"
        )
    else:
        yield (
            "one optimizer step a rollout with enable_old_logprobs_recompute: false: the ratio says how far trainer "
            f"and engine differ, not how far the policy moved; {way_out}"
        )


def _of_length_weighting(config: ExperimentConfig) -> Iterator[str]:
    if config.importance_sampling != "token" and config.loss_agg_mode != "seq-mean-token-mean":
        yield (
            f"loss_agg_mode: {config.loss_agg_mode} weighs sequences by length, the GSPO paper does not (LUSPO does, "
            "with seq-mean-token-sum); loss_agg_mode=seq-mean-token-mean is the paper's"
        )


def _of_clip_scale(config: ExperimentConfig) -> Iterator[str]:
    if config.clip_range is None:
        return
    widest, level = max(config.clip_range), config.importance_sampling
    if level != "token" and widest > TOKEN_SCALE_CLIP:
        yield (
            f"importance_sampling: {level} with the clip range {config.clip_range}: sequence "
            "ratios hardly leave [0.99, 1.01], so it never clips; the paper's is 3e-4/4e-4 "
            "(use_pg_clip_range: true, pg_clip_low: 3e-4, pg_clip_high: 4e-4)"
        )
    if level == "token" and widest < TOKEN_SCALE_CLIP:
        yield (
            f"importance_sampling: token with the clip range {config.clip_range}: token ratios leave it at once and "
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


def _of_execution(config: AnyConfig) -> Iterator[str]:
    if config.execution == "ray":
        nodes = 1 + max(max(devices_of(role)) for role in roles_of(config).values()) // devices_per_node(config)
        if config.num_nodes is not None and config.num_nodes > nodes:
            yield (
                f"num_nodes {config.num_nodes} with device mappings that end on machine {nodes} of them: the others "
                "stay idle; name their devices, or set num_nodes: null"
            )
        return
    idle = [key for key in RAY_ONLY if config.model_dump()[key] != _default_of(key)]
    if idle:
        yield f"execution: local: {', '.join(idle)} act(s) with execution: ray only; remove, or set that"


def _default_of(key: str) -> object:
    default = RunConfig.model_fields[key].default
    return default.model_dump() if isinstance(default, Schema) else default
