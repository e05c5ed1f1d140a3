"""Settings of roles and algorithms from the keys of a configuration."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.correction import CorrectionSettings
from roll_gspo.algorithms.kl import KLController, kl_controller
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.algorithms.value_loss import ValueLossSettings
from roll_gspo.config.base import Schema
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.lora import adapter_sync
from roll_gspo.config.roles import GeneratingArgs, ReferenceConfig, TrainedRoleConfig, TrainingArgs
from roll_gspo.config.sft import AnyConfig
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.pass_cost import PassCost
from roll_gspo.pipelines.passes import passes_text
from roll_gspo.pipelines.rlvr.experience import ExperienceSettings
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, Sampling
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.micro_batches import MicroBatching

Settings = TypeVar("Settings")
RoleT = TypeVar("RoleT", bound=TrainedRoleConfig | ReferenceConfig)
logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settings_from(settings: type[Settings], config: Schema, **derived: Any) -> Settings:
    """Build a settings dataclass: each field from `derived`, or else from the key of `config` with the same name."""
    names = [field.name for field in fields(settings) if field.name not in derived]  # type: ignore[arg-type]
    return settings(**{name: getattr(config, name) for name in names}, **derived)


def model_setup(
    config: AnyConfig, checkpoint: Path, dtype: str, micro_batch_size: int, max_tokens: int | None = None
) -> ModelSetup:
    """Build the `ModelSetup` of a role."""
    return ModelSetup(
        checkpoint=checkpoint,
        dtype=DTYPES[dtype],
        micro_batch_size=micro_batch_size,
        temperature=config.scoring_temperature,
        seed=config.seed,
        max_tokens=max_tokens,
    )


def lora_setup(config: AnyConfig) -> LoraSetup | None:
    """Build the adapter of `actor_train`, or None if all weights are trained."""
    lora = config.actor_train.model_args.lora
    if lora is None:
        return None
    sync = adapter_sync(lora, config.actor_infer.strategy_args) if isinstance(config, ExperimentConfig) else "merged"
    return settings_from(LoraSetup, lora, alpha=lora.effective_alpha, sync=sync)


def on_this_device(name: str, role: RoleT, checkpoint: Path) -> RoleT:
    """Return the block of a role that holds `checkpoint`, with the values that null stands for here, and log them."""
    on_cuda = torch.cuda.is_available()
    found = role.on_device(on_cuda, str(checkpoint))
    if on_cuda and found != role:
        logger.info("%s: %s", name, passes_text(found))
    return found


def micro_batching(role: TrainedRoleConfig, ranks: int, checkpoint: Path) -> MicroBatching:
    """Return how a trained role splits mini-batches into micro-batches for its data-parallel ranks."""
    size, cost = role.training_args.per_device_train_batch_size, PassCost()
    if ranks > 1:
        with suppress(ConfigError):  # of an engine that knows other models: balance tokens
            cost = PassCost.of(Architecture.from_checkpoint(checkpoint))
    return MicroBatching(size, role.max_tokens_per_microbatch_in_train, role.strategy_args.packs_samples, ranks, cost)


def optimizer_setup(config: AnyConfig, args: TrainingArgs, total_steps: int) -> OptimizerSetup:
    """Build the optimizer settings of a role that takes `total_steps` optimizer steps in the whole run."""
    return settings_from(
        OptimizerSetup,
        args,
        total_steps=total_steps,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=args.warmup_steps or round(args.warmup_ratio * total_steps),
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
    )


def policy_loss_settings(config: ExperimentConfig) -> PolicyLossSettings:
    """Build the settings of the policy loss."""
    low, high = config.clip_range or (None, None)
    correction = config.train_infer_correction
    return settings_from(
        PolicyLossSettings,
        config,
        clip_low=low,
        clip_high=high,
        dual_clip_ratio=config.effective_dual_clip_ratio,
        response_length=config.max_response_length,
        correction=correction and settings_from(CorrectionSettings, correction),
    )


def value_loss_settings(config: ExperimentConfig) -> ValueLossSettings:
    """Build the settings of the critic's loss, which is a mean over tokens."""
    return ValueLossSettings(config.value_clip, "token-mean", config.max_response_length)


def experience_settings(config: ExperimentConfig) -> ExperienceSettings:
    """Build the settings that turn a scored rollout into a training batch."""
    return settings_from(
        ExperienceSettings,
        config,
        advantages=settings_from(AdvantageSettings, config),
        masks=settings_from(SampleMaskSettings, config),
        response_length=config.max_response_length,
        part_weights=_part_weights(config) if config.adv_estimator == "gdpo" else {},
    )


def _part_weights(config: ExperimentConfig) -> dict[str, dict[str, float]]:
    """Return the weights of the parts of every reward that is a weighted sum, by domain and part."""
    return {
        domain: {name: 1.0 if part.weight is None else part.weight for name, part in block.parts.items()}
        for domain, block in config.rewards.items()
        if block.combine == "weighted_sum"
    }


def query_filter_settings(config: ExperimentConfig) -> dict[str, QueryFilterSettings]:
    """Build the query filter of each reward domain that drops groups."""
    return {
        domain: QueryFilterSettings(type=block.type, **block.filter_args.model_dump(exclude_none=True))
        for domain, block in config.query_filters.items()
    }


def sampling(args: GeneratingArgs, num_samples: int, response_length: int, stop_ids: tuple[int, ...]) -> Sampling:
    """Build the sampling settings of training or validation."""
    return Sampling(
        num_samples=args.num_return_sequences or num_samples,
        max_new_tokens=args.max_new_tokens or response_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k, 0),
        stop_token_ids=stop_ids,
    )


def new_kl_controller(config: ExperimentConfig) -> KLController | None:
    """Build the controller of the token-level KL, or None if it is off."""
    if not config.add_token_level_kl or config.init_kl_coef is None:
        return None
    return kl_controller(config.init_kl_coef, config.target_kl, config.kl_horizon)
