"""Factories of the roles. Worker processes call them too, so the arguments must be picklable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import PolicyConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.pipelines.settings import (
    lora_setup,
    micro_batching,
    model_setup,
    on_this_device,
    optimizer_setup,
    policy_loss_settings,
    value_loss_settings,
)
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.roles.reference import Reference
from roll_gspo.roles.replica import Replica
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.strategies.base import GenerationSetup, TrainStrategy
from roll_gspo.strategies.batch_streaming import streaming


def make_actor(config: ExperimentConfig, checkpoint: Path) -> Actor:
    """Build `actor_train`, or one rank of it."""
    role = on_this_device("actor_train", config.actor_train, checkpoint)
    generator = config.actor_infer.strategy_args
    return Actor(
        _train_strategy(config, role, checkpoint, config.num_updates),
        policy_loss_settings(config),
        mini_batch_size=config.mini_batch_size,
        micro_batching=micro_batching(role, config.data_parallel_size, checkpoint),
        num_epochs=config.ppo_epochs,
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
        seed=config.seed,
        measure_mismatch=not config.enable_old_logprobs_recompute,
        build_weight_sender=generator.build_weight_sender if generator.receives_between_gpus else None,
    )


def make_sft_actor(config: SftConfig, checkpoint: Path, num_steps: int) -> SftActor:
    """Build `actor_train` of `pipeline: sft`, or one rank of it, for a run of `num_steps` optimizer steps."""
    role = on_this_device("actor_train", config.actor_train, checkpoint)
    return SftActor(
        _train_strategy(config, role, checkpoint, num_steps),
        mini_batch_size=config.mini_batch_size,
        micro_batching=micro_batching(role, config.data_parallel_size, checkpoint),
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
    )


def _train_strategy(config: AnyConfig, role: PolicyConfig, checkpoint: Path, num_updates: int) -> TrainStrategy:
    """Build the engine of `actor_train`, whose block is `role`."""
    budget = role.max_tokens_per_microbatch_in_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size, budget)
    replay = role.router_replay
    routing = {"replay_routing": replay.mode != "disable", "record_routing": replay.record}
    setup = replace(setup, **routing, lora=lora_setup(config))
    return role.strategy_args.build_train(setup, optimizer_setup(config, role.training_args, num_updates))


def make_critic(config: ExperimentConfig, checkpoint: Path) -> Critic:
    """Build `critic`, or one rank of it."""
    assert config.critic is not None  # the schema requires the block if the estimator needs a critic
    role = on_this_device("critic", config.critic, checkpoint)
    budget = role.max_tokens_per_microbatch_in_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size, budget)
    optimizer = optimizer_setup(config, role.training_args, config.critic_updates_per_rollout * config.max_steps)
    return Critic(
        role.strategy_args.build_value(setup, optimizer),
        value_loss_settings(config),
        mini_batch_size=config.critic_mini_batch_size,
        micro_batching=micro_batching(role, config.critic_data_parallel_size, checkpoint),
        num_epochs=config.ppo_epochs,
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
        seed=config.seed,
    )


def make_reference(config: ExperimentConfig, checkpoint: Path) -> Reference:
    """Build `reference`, or one rank of it."""
    assert config.reference is not None  # the schema requires the block if a KL term is on
    role = on_this_device("reference", config.reference, checkpoint)
    budget = role.max_tokens_per_microbatch_in_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size, budget)
    return Reference(role.strategy_args.build_scorer(setup))


def make_generator(
    config: ExperimentConfig, checkpoint: Path, pad_token_id: int, shares_devices: bool = False
) -> Generator:
    """Build `actor_infer` with its engine in this process."""
    engine = _engine(config, checkpoint, receives_broadcast=False, shares_devices=shares_devices)
    return Generator(engine, pad_token_id, config.seed, LocalStream(streaming(engine)))


def make_evaluated(config: ExperimentConfig, checkpoint: Path, pad_token_id: int) -> Generator:
    """Build `actor_infer` with the weights of `checkpoint`, which no trainer replaces."""
    role = config.actor_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, 1)
    length = config.validation_prompt_length + config.validation_response_length
    engine = role.strategy_args.build_generator(setup, GenerationSetup(length, loads_checkpoint=True))
    stream = LocalStream(streaming(engine)) if config.plays_episodes else None
    return Generator(engine, pad_token_id, config.seed, stream)


def make_replica(config: ExperimentConfig, checkpoint: Path, shares_devices: bool = False) -> Replica:
    """Build one engine of `actor_infer` in a separate process."""
    return Replica(_engine(config, checkpoint, receives_broadcast=True, shares_devices=shares_devices))


def _engine(config: ExperimentConfig, checkpoint: Path, *, receives_broadcast: bool, shares_devices: bool) -> Any:
    role = config.actor_infer
    setup, lora = model_setup(config, checkpoint, role.model_args.dtype, 1), lora_setup(config)
    generation = GenerationSetup(
        config.engine_sequence_length,
        receives_broadcast=receives_broadcast,
        record_routed_experts=config.actor_train.router_replay.reads_rollout,
        shares_devices=shares_devices,
        lora=lora if config.sends_adapters else None,
        adapter_versions=config.versions_in_flight,
    )
    return role.strategy_args.build_generator(setup, generation)
