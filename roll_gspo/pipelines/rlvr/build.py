"""Build the components of a run of reinforcement learning from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Completion, Prompt
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.data.rendering import response_text
from roll_gspo.data.sampler import Sampler
from roll_gspo.execution.base import Executor
from roll_gspo.pipelines.components import (
    RunComponents,
    check_token_ids,
    load_tokenizer,
    make_output,
    resume,
    start_executor,
    stop_ids,
)
from roll_gspo.pipelines.data_sources import chat_format
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.rlvr.collect import Collector
from roll_gspo.pipelines.rlvr.datasets import Datasets, columns_of, make_sampler, read_datasets, tokenize
from roll_gspo.pipelines.rlvr.episode_managers import episode_manager
from roll_gspo.pipelines.rlvr.experience import ExperienceSettings
from roll_gspo.pipelines.rlvr.models import Models, start_models, trained_roles_of
from roll_gspo.pipelines.rlvr.request_sources import Episodes
from roll_gspo.pipelines.rlvr.rollout_stream import RolloutStream
from roll_gspo.pipelines.rlvr.rollout_thread import RolloutThread
from roll_gspo.pipelines.rlvr.sample_files import SampleFiles
from roll_gspo.pipelines.rlvr.staleness_gate import StalenessGate
from roll_gspo.pipelines.rlvr.state import RlvrState
from roll_gspo.pipelines.rlvr.stream_settings import StreamSettings
from roll_gspo.pipelines.rlvr.validation import SampleGenerator, Validation, check_keep_best
from roll_gspo.pipelines.run_folder import RunFolder
from roll_gspo.pipelines.settings import (
    experience_settings,
    new_kl_controller,
    query_filter_settings,
    sampling,
)
from roll_gspo.pipelines.step_profiler import StepProfiler
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.episode_manager import EpisodeManager, EpisodePlayer
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.reference import BaseReference, Reference
from roll_gspo.roles.reward_manager import RewardManager
from roll_gspo.roles.scorer import Scorer
from roll_gspo.roles.shared_devices import Phase, SharedDevices
from roll_gspo.roles.trained import TrainedRole
from roll_gspo.roles.weight_sync import WeightSync
from roll_gspo.strategies.base import Sampling
from roll_gspo.tracking.console import Console


@dataclass(frozen=True, kw_only=True)
class RlvrComponents(RunComponents):
    """The components of `RlvrSteps`.

    Attributes:
        actor_infer: the policy that generates.
        weights: sends the weights of `actor_train` to `actor_infer`.
        devices: the devices that roles share.
        reference, critic: None if no KL term or no estimator needs them.
        rewards: scores responses.
        collector: generates and scores the samples of a step.
        samples: writes the samples into files.
        experience: settings of the advantages.
        sampling: sampling settings of the training responses.
        validation: the held-out prompts, if there are any.
        validation_generator: samples the responses to them.
        num_prompts_dropped: training prompts longer than `prompt_length`.
    """

    actor_train: Actor
    state: RlvrState
    actor_infer: Generator
    weights: WeightSync
    devices: SharedDevices
    reference: Reference | BaseReference | None
    critic: Critic | None
    rewards: Scorer
    collector: Collector
    samples: SampleFiles
    experience: ExperienceSettings
    sampling: Sampling
    validation: Validation | None
    validation_generator: SampleGenerator
    num_prompts_dropped: int

    @property
    def trained_roles(self) -> dict[str, TrainedRole[Any]]:
        """Roles whose state a checkpoint holds, by the name of their folder in it."""
        return trained_roles_of(self.actor_train, self.critic)


def build_components(config: ExperimentConfig, folder: RunFolder, console: Console) -> RlvrComponents:
    """Read the data, prepare the model, start every role, and load the checkpoint to resume from.

    Raises:
        DataError: a data file cannot be used.
        ConfigError: the model or the engine does not allow a setting.
    """
    with console.stage("read data"):
        datasets = read_datasets(config)
    executor = start_executor(config, console)
    try:
        # Loading the model may take minutes. Rewards start first, so that a wrong reward fails at once.
        with console.stage("start rewards"):
            rewards = executor.start("rewards", partial(new_scorer, config))
            rewards.check(columns_of(config, row) for row in datasets.train + datasets.validation)
        checkpoint = prepare_checkpoint(config, model_of(config, config.actor_train), console)
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
    rewards: Scorer,
) -> RlvrComponents:
    data = _tokenized(config, datasets, checkpoint, console)
    sampler = make_sampler(config, data.train)
    models = start_models(config, checkpoint, executor, console, data.tokenizer.pad_token_id)
    state = RlvrState(
        step=0,
        sampler=sampler,
        running_moments=RunningMoments(),
        kl_controller=new_kl_controller(config),
        staleness_gate=None if config.staleness_gate is None else StalenessGate(config.staleness_gate),
    )
    groups, length = config.num_return_sequences_in_group, config.max_response_length
    training = sampling(config.actor_infer.generating_args, groups, length, data.stop_ids)
    # Closed before the engines and the rewards, because it uses them.
    make = partial(_make_collector, config, data, sampler, models, rewards, training)
    collector = executor.start("rollouts", make)
    state.pending = collector
    trained_roles = trained_roles_of(models.actor_train, models.critic)
    resume(config, folder, console, trained_roles, state, partial(models.devices.enter, Phase.TRAINING))
    samples = SampleFiles(
        folder.path,
        lambda ids: data.tokenizer.decode(list(ids)),
        state.first_logged_step,
        config.log_rollouts,
        config.trace_groups,
    )
    return RlvrComponents(
        executor=executor,
        actor_train=models.actor_train,
        actor_infer=models.actor_infer,
        weights=collector,
        devices=models.devices,
        reference=models.reference,
        critic=models.critic,
        rewards=rewards,
        collector=collector,
        samples=samples,
        experience=experience_settings(config),
        state=state,
        output=make_output(config, folder, console, state, samples),
        profiler=StepProfiler(config, folder.path, models.profiled),
        sampling=training,
        validation=new_validation(config, data.validation, data.stop_ids, rewards) if config.validation else None,
        validation_generator=validation_generator(config, models.actor_infer, rewards, data.tokenizer, data.stop_ids),
        num_steps=config.max_steps,
        num_prompts_dropped=len(datasets.train) - len(data.train),
    )


@dataclass(frozen=True)
class _Tokenized:
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
        check_token_ids((prompt.token_ids for prompt in (*train, *validation)), tokenizer, checkpoint)
    return _Tokenized(tokenizer, train, validation, stop_ids(config, blocks, tokenizer, checkpoint))


def new_validation(
    config: ExperimentConfig, prompts: tuple[Prompt, ...], stop_ids: tuple[int, ...], rewards: Scorer
) -> Validation:
    """Build the validation of the block `validation`, which must exist."""
    block = config.validation
    assert block is not None
    length = config.validation_response_length
    return Validation(
        block, prompts, sampling(block.generating_args, block.num_samples, length, stop_ids), rewards.domains
    )


def new_scorer(config: ExperimentConfig) -> Scorer:
    """Build what gives the rewards: environments, an agent, or the reward workers."""
    return episode_manager(config) if config.plays_episodes else RewardManager(config.rewards)


def validation_generator(
    config: ExperimentConfig, generator: Generator, scorer: Scorer, tokenizer: Any, stop_ids: tuple[int, ...]
) -> SampleGenerator:
    """Return what samples the validation responses: the engines, or episodes that are played with them."""
    block = config.validation
    if block is None or not isinstance(scorer, EpisodeManager):
        return generator
    turns = sampling(block.generating_args, block.num_samples, config.validation_response_length, stop_ids)
    chat = chat_format(config, block.data_args)
    open_client = partial(scorer.play, generator, tokenizer, chat, turns, validation=True)
    return EpisodePlayer(generator, open_client, scorer)


def _make_collector(
    config: ExperimentConfig,
    data: _Tokenized,
    sampler: Sampler[Prompt],
    models: Models,
    rewards: Scorer,
    training: Sampling,
) -> Collector:
    """Build the collector of a run. `training` are the sampling settings of its responses."""

    def text_of(completion: Completion) -> str:
        return response_text(data.tokenizer, completion.token_ids, data.stop_ids)

    settings = StreamSettings(
        sampling=training,
        groups_per_step=config.rollout_batch_size,
        num_steps=config.max_steps,
        max_staleness=config.async_generation_ratio,
        in_flight=config.updates_in_flight,
        partial_rollouts=config.partial_rollouts,
        query_filters=query_filter_settings(config),
        max_rounds=config.max_sampling_rounds,
    )
    source = None
    if isinstance(rewards, EpisodeManager):
        chat = chat_format(config, config.actor_train.data_args)
        play = partial(rewards.play, models.actor_infer, data.tokenizer, chat, training, validation=False)
        source = Episodes(rewards, play)
    stream = RolloutStream(sampler, models.actor_infer, rewards, text_of, settings, source)
    overlaps = config.is_async and config.execution != "local"
    thread = RolloutThread(stream, config.worker_timeout_s) if overlaps else None
    manager = config.train_env_manager
    return Collector(
        *(stream, models.actor_infer, rewards, text_of, models.weights, thread),
        max_failed_steps=config.max_failed_reward_steps,
        max_failed_fraction=None if manager is None else manager.max_failed_fraction,
    )
