"""What each role is made of. Workers of other processes call these too, so the arguments must pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.config.strategy import MegatronTrainArgs, VllmArgs
from roll_gspo.pipelines.settings import (
    micro_batching,
    model_setup,
    optimizer_setup,
    policy_loss_settings,
    value_loss_settings,
)
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.reference import Reference
from roll_gspo.roles.replicas import Replica
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.strategies import STRATEGIES, VALUE_STRATEGIES
from roll_gspo.strategies.base import TrainStrategy


def make_actor(config: ExperimentConfig, checkpoint: Path) -> Actor:
    """`actor_train`, or one rank of it."""
    return Actor(
        _train_strategy(config, checkpoint, config.num_updates),
        policy_loss_settings(config),
        mini_batch_size=config.mini_batch_size,
        micro_batching=micro_batching(config.actor_train),
        num_epochs=config.ppo_epochs,
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
        seed=config.seed,
        measure_mismatch=not config.enable_old_logprobs_recompute,
    )


def make_sft_actor(config: SftConfig, checkpoint: Path, num_steps: int) -> SftActor:
    """`actor_train` with `pipeline: sft`, or one rank of it, for a run of `num_steps` optimizer steps."""
    return SftActor(
        _train_strategy(config, checkpoint, num_steps),
        mini_batch_size=config.mini_batch_size,
        micro_batching=micro_batching(config.actor_train),
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
    )


def _train_strategy(config: AnyConfig, checkpoint: Path, num_updates: int) -> TrainStrategy:
    """The engine of `actor_train`."""
    role = config.actor_train
    budget = role.max_tokens_per_microbatch_in_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size, budget)
    optimizer = optimizer_setup(config, role.training_args, num_updates)
    args = role.strategy_args
    strategy_class = STRATEGIES.load(args.strategy_name)
    if isinstance(args, MegatronTrainArgs):
        replay = role.router_replay
        return strategy_class(
            setup, optimizer, args.strategy_config, router_replay=replay.mode, record_routing=replay.record
        )
    return strategy_class(setup, optimizer, args.strategy_config)


def make_critic(config: ExperimentConfig, checkpoint: Path) -> Critic:
    """`critic`, or one rank of it."""
    role = config.critic
    assert role is not None  # the schema demands the block where the estimator needs a critic
    budget = role.max_tokens_per_microbatch_in_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size, budget)
    optimizer = optimizer_setup(config, role.training_args, config.critic_updates_per_rollout * config.max_steps)
    args = role.strategy_args
    return Critic(
        VALUE_STRATEGIES.load(args.strategy_name)(setup, optimizer, args.strategy_config),
        value_loss_settings(config),
        mini_batch_size=config.critic_mini_batch_size,
        micro_batching=micro_batching(role),
        num_epochs=config.ppo_epochs,
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
        seed=config.seed,
    )


def make_reference(config: ExperimentConfig, checkpoint: Path) -> Reference:
    """`reference`, or one rank of it."""
    role = config.reference
    assert role is not None  # the schema demands the block where a KL term is on
    budget = role.max_tokens_per_microbatch_in_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size, budget)
    strategy = STRATEGIES.load(role.strategy_args.strategy_name)(setup, role.strategy_args.strategy_config)
    return Reference(strategy)


def make_generator(config: ExperimentConfig, checkpoint: Path, pad_token_id: int) -> Generator:
    """`actor_infer` with its engine in this process."""
    return Generator(_engine(config, checkpoint, receives_broadcast=False), pad_token_id, config.seed)


def make_evaluated(config: ExperimentConfig, checkpoint: Path, pad_token_id: int) -> Generator:
    """`actor_infer` with the weights of `checkpoint`, which no trainer will replace."""
    role, args = config.actor_infer, config.actor_infer.strategy_args
    setup = model_setup(config, checkpoint, role.model_args.dtype, 1)
    engine_class = STRATEGIES.load(args.strategy_name)
    if isinstance(args, VllmArgs):
        engine = args.strategy_config.model_copy(update={"load_format": "auto"})
        length = config.validation_prompt_length + config.validation_response_length
        # several devices need processes of their own, which only an engine over a wire has
        strategy = engine_class(setup, engine, length, receives_broadcast=engine.tensor_parallel_size > 1)
    else:
        strategy = engine_class(setup, args.strategy_config)
    return Generator(strategy, pad_token_id, config.seed)


def make_replica(config: ExperimentConfig, checkpoint: Path) -> Replica:
    """One engine of `actor_infer` in a process of its own."""
    return Replica(_engine(config, checkpoint, receives_broadcast=True))


def _engine(config: ExperimentConfig, checkpoint: Path, *, receives_broadcast: bool) -> Any:
    role = config.actor_infer
    setup = model_setup(config, checkpoint, role.model_args.dtype, 1)
    args = role.strategy_args
    engine_class = STRATEGIES.load(args.strategy_name)
    if isinstance(args, VllmArgs):
        replay = config.actor_train.router_replay
        record = replay.mode == "R3" or replay.record
        return engine_class(
            setup,
            args.strategy_config,
            config.engine_sequence_length,
            record_routed_experts=record,
            receives_broadcast=receives_broadcast,
        )
    return engine_class(setup, args.strategy_config)
