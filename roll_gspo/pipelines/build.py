"""From a configuration to the parts of a run, in the order in which they can live together in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roll_gspo.algorithms.advantage import AdvantageSettings
from roll_gspo.algorithms.kl import KLController, kl_controller
from roll_gspo.algorithms.policy_loss import PolicyLossSettings
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Completion, Prompt
from roll_gspo.checkpoint import CheckpointStore
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import GeneratingArgs
from roll_gspo.config.strategy import VllmArgs
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.execution import EXECUTORS
from roll_gspo.execution.base import Executor
from roll_gspo.pipelines.datasets import Datasets, read_datasets, tokenize
from roll_gspo.pipelines.output import Output
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.run_folder import RunFolder, config_yaml
from roll_gspo.pipelines.state import ACTOR, TrainerState
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.judge import Judge
from roll_gspo.roles.reference import Reference
from roll_gspo.strategies import STRATEGIES
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, Sampling
from roll_gspo.tracking.base import build_trackers
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.rollouts import RolloutWriter

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """What the training loop works with."""

    executor: Executor
    actor_train: Actor
    actor_infer: Generator
    reference: Reference | None
    rewards: Judge
    state: TrainerState
    output: Output
    sampling: Sampling
    advantage_settings: AdvantageSettings
    validation_prompts: tuple[Prompt, ...]
    validation_sampling: Sampling | None
    num_prompts_dropped: int
    text_of: Callable[[Completion], str]


def build_parts(config: ExperimentConfig, folder: RunFolder, console: Console) -> Parts:
    """Read the data, make or find the model, start every role, and load the checkpoint to go on from.

    Raises:
        DataError: a data file cannot be used.
        ConfigError: a setting turns out to be impossible for the model or the engine.
    """
    with console.stage("read data"):
        datasets = read_datasets(config)
    executor: Executor = EXECUTORS.load(config.execution)()
    try:
        with console.stage("start rewards"):  # first, for a wrong one shows at once and a model may take minutes
            rewards = executor.start("rewards", lambda: Judge(config.rewards))
            rewards.check({"id": r.id, "domain": r.domain, "tag": r.tag} for r in datasets.train + datasets.validation)
        pretrain = config.actor_train.model_args.model_name_or_path or config.pretrain
        checkpoint = prepare_checkpoint(config, pretrain, console)
        return _start_roles(config, folder, console, datasets, checkpoint, executor, rewards)
    except BaseException:
        executor.close()
        raise


def _start_roles(
    config: ExperimentConfig,
    folder: RunFolder,
    console: Console,
    datasets: Datasets,
    checkpoint: Path,
    executor: Executor,
    rewards: Judge,
) -> Parts:
    with console.stage("tokenize prompts"):
        tokenizer = load_tokenizer(checkpoint)
        train_prompts = tokenize(datasets.train, tokenizer, config.actor_train.data_args, config.prompt_length)
        validation_prompts: tuple[Prompt, ...] = ()
        if config.validation is not None:
            validation_prompts = tokenize(
                datasets.validation, tokenizer, config.validation.data_args, config.prompt_length
            )
    stop_ids = stop_token_ids(tokenizer, checkpoint)
    with console.stage("start actor_train"):
        actor = executor.start("actor_train", lambda: _actor(config, checkpoint))
    reference = None
    if config.needs_reference:
        with console.stage("start reference"):
            reference = executor.start("reference", lambda: _reference(config, checkpoint, console))
    with console.stage("start actor_infer"):
        generator = executor.start("actor_infer", lambda: _generator(config, checkpoint, tokenizer.pad_token_id))
    state = TrainerState(
        step=0,
        sampler=PromptSampler(train_prompts, config.seed),
        running_moments=RunningMoments(),
        kl_controller=_kl_controller(config),
    )
    if folder.resumed_from is not None:
        with console.stage("load checkpoint"):
            actor.load(folder.resumed_from.folder / ACTOR)
            state.load(folder.resumed_from.folder)
        console.message(f"resumed after step {state.step} from {folder.resumed_from.folder}")
    elif config.resume_from_checkpoint is True:
        console.warning("resume_from_checkpoint: no complete checkpoint was found; starting from the beginning")
    validation = config.validation
    return Parts(
        executor=executor,
        actor_train=actor,
        actor_infer=generator,
        reference=reference,
        rewards=rewards,
        state=state,
        output=_output(config, folder, console, state.step + 1, tokenizer),
        sampling=_sampling(config, config.actor_infer.generating_args, config.num_return_sequences_in_group, stop_ids),
        advantage_settings=_advantage_settings(config),
        validation_prompts=validation_prompts,
        validation_sampling=_sampling(config, validation.generating_args, 1, stop_ids) if validation else None,
        num_prompts_dropped=len(datasets.train) - len(train_prompts),
        text_of=lambda completion: tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
    )


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer, with a padding token (the end-of-sequence token where it has none)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(tokenizer: Any, checkpoint: Path) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's end-of-sequence and those of generation_config.json."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    if (checkpoint / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(checkpoint).eos_token_id
        ids |= set(configured) if isinstance(configured, list) else {configured}
    return tuple(sorted(i for i in ids if i is not None))


def _model_setup(config: ExperimentConfig, checkpoint: Path, dtype: str, micro_batch_size: int) -> ModelSetup:
    return ModelSetup(
        checkpoint=checkpoint,
        dtype=DTYPES[dtype],
        micro_batch_size=micro_batch_size,
        temperature=config.actor_infer.generating_args.temperature,
        seed=config.seed,
    )


def _actor(config: ExperimentConfig, checkpoint: Path) -> Actor:
    role = config.actor_train
    args = role.training_args
    total_steps = config.updates_per_rollout * config.max_steps
    optimizer = OptimizerSetup(
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
    setup = _model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size)
    strategy = STRATEGIES.load(role.strategy_args.strategy_name)(setup, optimizer, role.strategy_args.strategy_config)
    low, high = config.clip_range
    loss = PolicyLossSettings(
        importance_sampling=config.importance_sampling,
        clip_low=low,
        clip_high=high,
        dual_clip_ratio=config.effective_dual_clip_ratio,
        loss_agg_mode=config.loss_agg_mode,
        response_length=config.max_response_length,
        kl_loss_coef=config.kl_loss_coef,
        kl_loss_type=config.kl_loss_type,
        entropy_loss_coef=config.entropy_loss_coef,
    )
    return Actor(
        strategy,
        loss,
        mini_batch_size=config.mini_batch_size,
        micro_batch_size=args.per_device_train_batch_size,
        num_epochs=config.ppo_epochs,
        max_consecutive_skipped_steps=config.max_consecutive_skipped_steps,
        seed=config.seed,
    )


def _reference(config: ExperimentConfig, checkpoint: Path, console: Console) -> Reference:
    role = config.reference
    assert role is not None  # the schema demands the block where a KL term is on
    if role.model_args.model_name_or_path is not None:
        checkpoint = prepare_checkpoint(config, role.model_args.model_name_or_path, console)
    setup = _model_setup(config, checkpoint, role.model_args.dtype, role.infer_batch_size)
    strategy = STRATEGIES.load(role.strategy_args.strategy_name)(setup, role.strategy_args.strategy_config)
    return Reference(strategy)


def _generator(config: ExperimentConfig, checkpoint: Path, pad_token_id: int) -> Generator:
    role = config.actor_infer
    setup = _model_setup(config, checkpoint, role.model_args.dtype, 1)
    strategy_class = STRATEGIES.load(role.strategy_args.strategy_name)
    if isinstance(role.strategy_args, VllmArgs):
        strategy = strategy_class(setup, role.strategy_args.strategy_config, config.max_sequence_length)
    else:
        strategy = strategy_class(setup, role.strategy_args.strategy_config)
    return Generator(strategy, pad_token_id, config.seed)


def _sampling(config: ExperimentConfig, args: GeneratingArgs, num_samples: int, stop_ids: tuple[int, ...]) -> Sampling:
    return Sampling(
        num_samples=args.num_return_sequences or num_samples,
        max_new_tokens=args.max_new_tokens or config.max_response_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k, 0),
        stop_token_ids=stop_ids,
    )


def _advantage_settings(config: ExperimentConfig) -> AdvantageSettings:
    return AdvantageSettings(
        adv_estimator=config.adv_estimator,
        gamma=config.gamma,
        reward_norm=config.reward_norm,
        reward_shift=config.reward_shift,
        reward_scale=config.reward_scale,
        reward_clip=config.reward_clip,
        add_token_level_kl=config.add_token_level_kl,
        kl_penalty=config.kl_penalty,
        whiten_advantages=config.whiten_advantages,
        advantage_clip=config.advantage_clip,
    )


def _kl_controller(config: ExperimentConfig) -> KLController | None:
    if not config.add_token_level_kl or config.init_kl_coef is None:
        return None
    return kl_controller(config.init_kl_coef, config.target_kl, config.kl_horizon)


def _output(config: ExperimentConfig, folder: RunFolder, console: Console, first_step: int, tokenizer: Any) -> Output:
    kwargs = config.tracker_kwargs.model_dump(exclude_none=True)
    return Output(
        folder=folder.path,
        checkpoints=CheckpointStore(folder.checkpoints, config.checkpoint_config.max_ckpt_to_keep),
        trackers=build_trackers([config.track_with], folder.path, first_step, kwargs),
        rollouts=RolloutWriter(folder.path / "rollouts", first_step),
        console=console,
        config_text=config_yaml(config),
        save_hf_model=config.actor_train.training_args.save_hf_model,
        decode=lambda ids: tokenizer.decode(list(ids)),
    )
