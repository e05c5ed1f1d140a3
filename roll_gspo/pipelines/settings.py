"""From the keys of a configuration to what roles and algorithms are made with; nothing is built here."""

from __future__ import annotations

from pathlib import Path

import torch

from roll_gspo.algorithms.advantage import AdvantageSettings
from roll_gspo.algorithms.correction import CorrectionSettings
from roll_gspo.algorithms.kl import KLController, kl_controller
from roll_gspo.algorithms.policy_loss import PolicyLossSettings
from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.algorithms.value_loss import ValueLossSettings
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import CriticConfig, GeneratingArgs, PolicyConfig, TrainingArgs
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.config.strategy import MegatronTrainArgs
from roll_gspo.pipelines.experience import ExperienceSettings
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, Sampling
from roll_gspo.strategies.micro_batches import MicroBatching

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_setup(
    config: AnyConfig, checkpoint: Path, dtype: str, micro_batch_size: int, max_tokens: int | None = None
) -> ModelSetup:
    """Of any role; every engine scores at the temperature that responses are sampled at, 1 where none are."""
    is_sft = isinstance(config, SftConfig)
    return ModelSetup(
        checkpoint=checkpoint,
        dtype=DTYPES[dtype],
        micro_batch_size=micro_batch_size,
        temperature=1.0 if is_sft else config.actor_infer.generating_args.temperature,
        seed=config.seed,
        max_tokens=max_tokens,
    )


def micro_batching(role: PolicyConfig | CriticConfig) -> MicroBatching:
    """How the mini-batches of a trained role are cut into passes."""
    args = role.strategy_args
    packed = isinstance(args, MegatronTrainArgs) and args.strategy_config.use_sequence_packing
    size = role.training_args.per_device_train_batch_size
    return MicroBatching(size, role.max_tokens_per_microbatch_in_train, packed)


def optimizer_setup(config: AnyConfig, args: TrainingArgs, total_steps: int) -> OptimizerSetup:
    """Of a role that takes `total_steps` optimizer steps in the whole run."""
    return OptimizerSetup(
        learning_rate=args.learning_rate,
        total_steps=total_steps,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps or round(args.warmup_ratio * total_steps),
        min_learning_rate=args.min_learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
    )


def policy_loss_settings(config: ExperimentConfig) -> PolicyLossSettings:
    """Of `actor_train`."""
    low, high = config.clip_range or (None, None)
    correction = config.train_infer_correction
    return PolicyLossSettings(
        importance_sampling=config.importance_sampling,
        policy_loss=config.policy_loss,
        clip_low=low,
        clip_high=high,
        dual_clip_ratio=config.effective_dual_clip_ratio,
        sapo_tau_positive=config.sapo_tau_positive,
        sapo_tau_negative=config.sapo_tau_negative,
        loss_agg_mode=config.loss_agg_mode,
        response_length=config.max_response_length,
        kl_loss_coef=config.kl_loss_coef,
        kl_loss_type=config.kl_loss_type,
        entropy_loss_coef=config.entropy_loss_coef,
        correction=correction and CorrectionSettings(**correction.model_dump()),
    )


def value_loss_settings(config: ExperimentConfig) -> ValueLossSettings:
    """Of `critic`."""
    return ValueLossSettings(value_clip=config.value_clip, response_length=config.max_response_length)


def experience_settings(config: ExperimentConfig) -> ExperienceSettings:
    """Between a judged rollout and its training batch."""
    return ExperienceSettings(
        advantages=AdvantageSettings(
            adv_estimator=config.adv_estimator,
            gamma=config.gamma,
            lambd=config.lambd,
            reward_norm=config.reward_norm,
            reward_shift=config.reward_shift,
            reward_scale=config.reward_scale,
            reward_clip=config.reward_clip,
            add_token_level_kl=config.add_token_level_kl,
            kl_penalty=config.kl_penalty,
            whiten_advantages=config.whiten_advantages,
            advantage_clip=config.advantage_clip,
        ),
        masks=SampleMaskSettings(
            max_len_mask=config.max_len_mask,
            difficulty_mask=config.difficulty_mask,
            difficulty_low_threshold=config.difficulty_low_threshold,
            difficulty_high_threshold=config.difficulty_high_threshold,
        ),
        response_length=config.max_response_length,
        length_loss_weight=config.length_loss_weight,
        difficulty_loss_weight=config.difficulty_loss_weight,
        overlong_buffer_length=config.overlong_buffer_length,
        overlong_penalty_factor=config.overlong_penalty_factor,
    )


def query_filter_settings(config: ExperimentConfig) -> dict[str, QueryFilterSettings]:
    """Which groups are dropped and replaced, by reward domain; a domain whose groups are all kept is left out."""
    return {
        domain: QueryFilterSettings(type=block.type, **block.filter_args.model_dump(exclude_none=True))
        for domain, block in config.query_filters.items()
    }


def sampling(args: GeneratingArgs, num_samples: int, response_length: int, stop_ids: tuple[int, ...]) -> Sampling:
    """Of training or validation responses."""
    return Sampling(
        num_samples=args.num_return_sequences or num_samples,
        max_new_tokens=args.max_new_tokens or response_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k, 0),
        stop_token_ids=stop_ids,
    )


def new_kl_controller(config: ExperimentConfig) -> KLController | None:
    """Of the token-level KL, or None where it is off."""
    if not config.add_token_level_kl or config.init_kl_coef is None:
        return None
    return kl_controller(config.init_kl_coef, config.target_kl, config.kl_horizon)
