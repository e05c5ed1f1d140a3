"""Blocks of episodes: the environments, and how many episodes are played."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, JsonValue, PositiveFloat, PositiveInt

from roll_gspo.config.agent import AgentConfig
from roll_gspo.config.base import Names, Schema
from roll_gspo.config.environment_table import ENVIRONMENTS, SEEDS
from roll_gspo.errors import ConfigError

MAX_EPISODES_PER_WORKER = 256


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _known(name: str) -> str:
    """Accept a shipped environment or the dotted path of a class."""
    try:
        ENVIRONMENTS[name]
    except ConfigError as error:
        problem = str(error).removeprefix("env_type: ")
        raise ValueError(f"{problem}; or the dotted path of your class") from error
    return name


class EnvironmentConfig(Schema):
    """One kind of environment. It plays rows of this `domain`, and rows with one of `tag_included`."""

    env_type: Annotated[str, AfterValidator(_known)]
    """A shipped environment such as `adding_machine` (the page Agents lists all), or the dotted path of your subclass
    of `roll_gspo.environments.Environment`."""
    env_config: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    max_steps: PositiveInt = 10
    """Largest number of answers of the model per episode."""
    max_tokens_per_step: PositiveInt | None = None
    """Largest number of tokens per answer; null: what is left of `response_length`, which limits the episode."""
    tag_included: Names = ()
    """Tags of data rows that this environment plays, in addition to rows whose domain is the name of this block."""
    timeout_s: PositiveFloat = 60.0
    """Time limit in seconds of the environment per answer. After it, the episode has failed."""
    episode_timeout_s: PositiveFloat = 3600.0
    """Time limit in seconds per episode, generation included. After it, the episode ends with the rewards so far."""
    start_timeout_s: PositiveFloat = 120.0
    """Time limit in seconds for the start of a worker process."""
    max_memory_mb: PositiveInt | None = None
    """Memory limit of a worker process in MiB; null: no limit."""
    python: str | None = None
    """Interpreter of the worker processes, for an environment whose packages conflict with those of the trainer; null:
    the interpreter of the run."""


class EnvManagerConfig(Schema):
    """Number of episodes, and the processes that play them."""

    num_env_groups: PositiveInt | None = None
    """Groups per step; null: `rollout_batch_size`. In validation: number of rows; null: those of `validation`."""
    group_size: PositiveInt | None = None
    """Episodes per group, which have the same row; null: `num_return_sequences_in_group`. In validation: episodes per
    row."""
    tags: Names = ()
    """Blocks of `custom_envs` to play; empty: all."""
    num_groups_partition: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)] | None = None
    """Groups of each of `tags`; null: rows are shuffled. Only for rows that are seeds (`builtin:seeds`)."""
    max_env_num_per_worker: PositiveInt | None = None
    """Episodes that a worker process plays at the same time, each in a thread; further ones wait. Null: at most 256."""
    world_size: PositiveInt | None = None
    """Worker processes per environment; null: half the CPU cores, at most 8."""
    format_penalty: FiniteFloat = 0.0
    """Added to the reward of an answer that the environment cannot understand, e.g. -0.15."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest fraction of the episodes of a training step that may fail. Above it, the run stops with the cause.
    1: never. Only in training."""

    @property
    def num_workers(self) -> int:
        """Number of worker processes per environment: `world_size`, or its default on this machine."""
        return self.world_size or max(1, min(8, len(os.sched_getaffinity(0)) // 2))

    @property
    def episodes_per_worker(self) -> int:
        """Episodes that a worker process plays at the same time."""
        return self.max_env_num_per_worker or MAX_EPISODES_PER_WORKER


class EpisodeConfig(Schema):
    """Keys of responses of several turns."""

    agent: AgentConfig | None = None
    """A program of yours that plays the episodes, instead of `custom_envs`."""
    custom_envs: dict[str, EnvironmentConfig] = Field(default_factory=dict)
    """Environments by a name of your choice, for responses of several turns."""
    train_env_manager: EnvManagerConfig | None = None
    """Training episodes. With this block, a response is an episode of one of `custom_envs`."""
    val_env_manager: EnvManagerConfig | None = None
    """Episodes of the validation; null: as in training, one per row of `validation`."""

    @property
    def plays_episodes(self) -> bool:
        """True if responses are episodes of `custom_envs` or `agent`."""
        return self.train_env_manager is not None

    @property
    def played_environments(self) -> dict[str, EnvironmentConfig]:
        """The blocks of `custom_envs` that training or validation plays."""
        managers = [block for block in (self.train_env_manager, self.val_env_manager) if block is not None]
        everything = any(not manager.tags for manager in managers)
        played = {tag for manager in managers for tag in manager.tags}
        return {name: block for name, block in self.custom_envs.items() if everything or name in played}

    @property
    def environment_shares(self) -> dict[str, float] | None:
        """Share of each environment in a batch of training prompts, or None."""
        manager = self.train_env_manager
        if manager is None or manager.num_groups_partition is None:
            return None
        tags, total = manager.tags or tuple(self.custom_envs), sum(manager.num_groups_partition)
        return {tag: number / total for tag, number in zip(tags, manager.num_groups_partition, strict=True)}

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in the keys of prompts, groups and validation from the blocks of episodes."""
        return _fill_episodes(super().fill_defaults(values))


def _fill_episodes(values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("agent"), dict):
        values = {"train_env_manager": {}} | values
        values |= {"rewards": values.get("rewards") or {}}  # `rewards: null` removes the blocks of an option of `data`
    train, validation = values.get("train_env_manager"), values.get("val_env_manager")
    if not isinstance(train, dict):
        return {"rewards": {}} | values if values.get("custom_envs") else values
    filled = {
        "rollout_batch_size": train.get("num_env_groups"),
        "num_return_sequences_in_group": train.get("group_size"),
        "rewards": {},
    }
    values = {key: value for key, value in filled.items() if value is not None} | values
    actor = values.get("actor_train")
    if isinstance(actor, dict):
        values["actor_train"] = actor | {"data_args": {"file_name": SEEDS} | (actor.get("data_args") or {})}
    if isinstance(validation, dict) and values.get("validation", {}) is not None:
        rows, size = validation.get("num_env_groups"), validation.get("group_size")
        block = values.get("validation") or {}
        data = {"file_name": SEEDS} | ({"num_rows": rows} if rows is not None else {}) | (block.get("data_args") or {})
        sampling = {"num_return_sequences": size} if size is not None else {}
        sampling |= block.get("generating_args") or {}
        values["validation"] = block | {"data_args": data, "generating_args": sampling}
    return values
