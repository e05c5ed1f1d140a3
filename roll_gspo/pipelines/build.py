"""Build the components of a run from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Prompt
from roll_gspo.checkpoint import CheckpointStore
from roll_gspo.config.data import SourceArgs
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.data.prompts import end_of_turn_ids
from roll_gspo.execution import EXECUTORS
from roll_gspo.execution.base import Executor
from roll_gspo.pipelines.collect import Collector
from roll_gspo.pipelines.datasets import Datasets, chat_format, make_sampler, read_datasets, tokenize
from roll_gspo.pipelines.experience import ExperienceSettings
from roll_gspo.pipelines.output import Output
from roll_gspo.pipelines.placement import execution_settings, start_models
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.run_folder import RunFolder, config_yaml
from roll_gspo.pipelines.settings import (
    experience_settings,
    new_kl_controller,
    query_filter_settings,
    sampling,
)
from roll_gspo.pipelines.state import ACTOR, CRITIC, RunState, TrainerState
from roll_gspo.pipelines.step_loop import RunComponents
from roll_gspo.pipelines.validation import Validation, check_keep_best
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.reference import Reference
from roll_gspo.roles.reward_manager import RewardManager
from roll_gspo.roles.trained import TrainedRole
from roll_gspo.roles.weight_sync import WeightSync
from roll_gspo.strategies.base import Sampling
from roll_gspo.tracking.base import build_trackers
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.rollouts import RolloutWriter


@dataclass(frozen=True, kw_only=True)
class Components(RunComponents):
    """The components of `RlvrSteps`.

    Attributes:
        actor_infer: the policy that generates.
        weights: sends the weights of `actor_train` to it.
        reference, critic: None if no KL term, no estimator needs them.
        rewards, collector: score responses; generate and score the samples of a step.
        experience: settings of the advantages.
        sampling: of the training responses.
        validation: the held-out prompts.
        num_prompts_dropped: training prompts longer than `prompt_length`.
    """

    actor_train: Actor
    state: TrainerState
    actor_infer: Generator
    weights: WeightSync
    reference: Reference | None
    critic: Critic | None
    rewards: RewardManager
    collector: Collector
    experience: ExperienceSettings
    sampling: Sampling
    validation: Validation | None
    num_prompts_dropped: int

    @property
    def trained_roles(self) -> dict[str, TrainedRole[Any]]:
        """The roles whose state a checkpoint holds, by the name of their folder in it."""
        return _trained_roles(self.actor_train, self.critic)


def build_components(config: ExperimentConfig, folder: RunFolder, console: Console) -> Components:
    """Read the data, make or find the model, start every role, and load the checkpoint to go on from.

    Raises:
        DataError: a data file cannot be used.
        ConfigError: a setting turns out to be impossible for the model or the engine.
    """
    with console.stage("read data"):
        datasets = read_datasets(config)
    with console.stage("start ray") if config.execution == "ray" else nullcontext():
        executor: Executor = EXECUTORS.load(config.execution)(execution_settings(config))
    try:
        with console.stage("start rewards"):  # first, for a wrong one shows at once and a model may take minutes
            rewards = executor.start("rewards", lambda: RewardManager(config.rewards))
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
    rewards: RewardManager,
) -> Components:
    data = _tokenized(config, datasets, checkpoint, console)
    sampler = make_sampler(config, data.train)
    models = start_models(config, checkpoint, executor, console, data.tokenizer.pad_token_id)
    state = TrainerState(
        step=0,
        sampler=sampler,
        running_moments=RunningMoments(),
        kl_controller=new_kl_controller(config),
    )
    resume(config, folder, console, _trained_roles(models.actor_train, models.critic), state)
    groups, length = config.num_return_sequences_in_group, config.max_response_length
    training = sampling(config.actor_infer.generating_args, groups, length, data.stop_ids)
    return Components(
        executor=executor,
        actor_train=models.actor_train,
        actor_infer=models.actor_infer,
        weights=models.weights,
        reference=models.reference,
        critic=models.critic,
        rewards=rewards,
        collector=_collector(config, state, models.actor_infer, rewards, training, data.tokenizer),
        experience=experience_settings(config),
        state=state,
        output=make_output(config, folder, console, state, data.tokenizer),
        sampling=training,
        validation=new_validation(config, data.validation, data.stop_ids, rewards) if config.validation else None,
        num_steps=config.max_steps,
        num_prompts_dropped=len(datasets.train) - len(data.train),
    )


def _trained_roles(actor: Actor, critic: Critic | None) -> dict[str, TrainedRole[Any]]:
    return {ACTOR: actor} if critic is None else {ACTOR: actor, CRITIC: critic}


@dataclass(frozen=True)
class _Tokenized:
    """Prompts, and the tokenizer that made them."""

    tokenizer: Any
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    stop_ids: tuple[int, ...]


def _tokenized(config: ExperimentConfig, datasets: Datasets, checkpoint: Path, console: Console) -> _Tokenized:
    with console.stage("tokenize prompts"):
        tokenizer = load_tokenizer(checkpoint)
        blocks = [config.actor_train.data_args]
        train = tokenize(config, blocks[0], datasets.train, tokenizer, config.prompt_length)
        validation: tuple[Prompt, ...] = ()
        if config.validation is not None:
            blocks.append(config.validation.data_args)
            length = config.validation_prompt_length
            validation = tokenize(config, blocks[1], datasets.validation, tokenizer, length)
            check_keep_best(config.checkpoint_config.keep_best, validation, config.validation)
    return _Tokenized(tokenizer, train, validation, stop_ids(config, blocks, tokenizer, checkpoint))


def stop_ids(config: AnyConfig, blocks: Sequence[SourceArgs], tokenizer: Any, checkpoint: Path) -> tuple[int, ...]:
    """Every id that ends a response: those of the model, and those that end a turn in the templates of the data."""
    stops = set(stop_token_ids(tokenizer, checkpoint))
    for args in blocks:
        stops |= end_of_turn_ids(tokenizer, chat_format(config, args))
    return tuple(sorted(stops))


def new_validation(
    config: ExperimentConfig, prompts: tuple[Prompt, ...], stop_ids: tuple[int, ...], rewards: RewardManager
) -> Validation:
    """What the block `validation`, which must be there, asks for."""
    block = config.validation
    assert block is not None
    length = config.validation_response_length
    how = sampling(block.generating_args, block.num_samples, length, stop_ids)
    return Validation(block, prompts, how, rewards.domains)


def resume(
    config: AnyConfig,
    folder: RunFolder,
    console: Console,
    roles: Mapping[str, TrainedRole[Any]],
    state: RunState[Any],
) -> None:
    """Load the checkpoint to resume from, if there is one, into `roles` (by folder name) and `state`."""
    if folder.resumed_from is None:
        if config.resume_from_checkpoint is True:
            console.warning("resume_from_checkpoint: no complete checkpoint was found; starting from the beginning")
        return
    source = folder.resumed_from.folder
    with console.stage("load checkpoint"):
        for name, role in roles.items():
            role.load(source / name)
        state.load(source)
        keep = config.checkpoint_config
        if state.best is not None and (state.best.metric, state.best.mode) != (keep.keep_best, keep.keep_best_mode):
            state.best = None  # another figure decides now
    console.message(f"resumed after step {state.step} from {source}")


def _collector(
    config: ExperimentConfig,
    state: TrainerState,
    generator: Generator,
    rewards: RewardManager,
    training: Sampling,
    tokenizer: Any,
) -> Collector:
    return Collector(
        state.sampler,
        generator,
        rewards,
        training,
        lambda completion: tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
        num_prompts=config.rollout_batch_size,
        query_filters=query_filter_settings(config),
        max_rounds=config.max_sampling_rounds,
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


def make_output(config: AnyConfig, folder: RunFolder, console: Console, state: RunState[Any], tokenizer: Any) -> Output:
    """What writes into the run's folder from the step after those that are done on."""
    first_step = state.step + 1 if state.step else 0  # from the beginning step 0, the first validation, is repeated
    kwargs = config.tracker_kwargs.model_dump(exclude_none=True)
    checkpoints = CheckpointStore(folder.checkpoints, config.checkpoint_config.max_ckpt_to_keep, state.best)
    state.best = checkpoints.best  # that of another folder is not kept here
    return Output(
        folder=folder.path,
        checkpoints=checkpoints,
        trackers=build_trackers([config.track_with], folder.path, first_step, kwargs),
        rollouts=RolloutWriter(folder.path / "rollouts", first_step),
        validation=RolloutWriter(folder.path / "validation", first_step),
        console=console,
        config_text=config_yaml(config),
        save_hf_model=config.actor_train.training_args.save_hf_model,
        asynchronous=config.checkpoint_config.async_save,
        decode=lambda ids: tokenizer.decode(list(ids)),
    )
