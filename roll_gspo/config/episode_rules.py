"""Rules between the blocks of episodes and all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from roll_gspo.config.base import Names, Problem
from roll_gspo.config.data import DataArgs
from roll_gspo.config.environment_table import SEEDS
from roll_gspo.config.environments import EnvManagerConfig, EpisodeConfig
from roll_gspo.config.validation import ValidationConfig


class OtherBlocks(NamedTuple):
    """Keys outside the blocks of episodes.

    Attributes:
        rewards: names of the blocks of `rewards`.
        num_groups, group_size: `rollout_batch_size` and `num_return_sequences_in_group`.
        data: `actor_train.data_args`.
        validation: the block `validation`.
        replays_rollout: True if the trainer replays the experts of the engine.
        has_tag_templates: True if rows have templates by tag.
    """

    rewards: tuple[str, ...]
    num_groups: int
    group_size: int
    data: DataArgs
    validation: ValidationConfig | None
    replays_rollout: bool
    has_tag_templates: bool


def broken_episode_rules(config: EpisodeConfig, others: OtherBlocks) -> Iterator[Problem]:
    """Yield missing blocks of rewards or environments, and keys that episodes cannot have."""
    manager = config.train_env_manager
    if manager is None:
        if not others.rewards and not config.custom_envs:
            yield Problem("rewards", "no domain is configured; add at least one with its worker_cls")
        for key in ("custom_envs", "val_env_manager"):
            if config.__dict__[key]:
                yield Problem(key, "is used only with train_env_manager; add that block (it may be {})")
        return
    if config.agent is not None:
        yield from _broken_agent_rules(config, others)
    elif not config.custom_envs:
        yield Problem("train_env_manager", "there is no environment; add custom_envs or agent", ("custom_envs",))
    if others.rewards:
        names = ", ".join(others.rewards)
        givers = "environments give" if config.agent is None else "a program gives"
        message = f"{names} score responses of one turn, and {givers} the rewards here; remove one block"
        yield Problem("rewards", message, ("train_env_manager", "agent"))
    if others.replays_rollout:
        message = "replays experts that were recorded in one turn, and an episode has several; set router_replay=none"
        yield Problem("actor_train.router_replay.mode", message, ("train_env_manager",))
    if others.has_tag_templates:
        yield Problem("tag_to_template", "episodes have one template; set template", ("train_env_manager",))
    groups = ("rollout_batch_size", others.num_groups)
    size = ("num_return_sequences_in_group", others.group_size)
    same: dict[str, tuple[str, int | None]] = {"num_env_groups": groups, "group_size": size}
    yield from _broken_manager_rules("train_env_manager", manager, tuple(config.custom_envs), same)
    yield from _broken_seed_rules("train_env_manager", manager, "actor_train", others.data)
    yield from _broken_validation_rules(config, others.validation)


def _broken_agent_rules(config: EpisodeConfig, others: OtherBlocks) -> Iterator[Problem]:
    """Yield blocks that are not used with an agent."""
    if config.custom_envs:
        names = ", ".join(config.custom_envs)
        yield Problem("agent", f"plays the episodes, and so would {names}; remove one block", ("custom_envs",))
    for name, manager in (("train_env_manager", config.train_env_manager), ("val_env_manager", config.val_env_manager)):
        for key in ("max_env_num_per_worker", "world_size"):
            if manager is not None and (value := manager.__dict__[key]) is not None:
                message = f"{value} is for custom_envs; set agent.max_concurrent, and remove this key"
                yield Problem(f"{name}.{key}", message, ("agent",))
    blocks = {"actor_train": others.data}
    if others.validation is not None:
        blocks["validation"] = others.validation.data_args
    for name, data in blocks.items():
        if data.system_prompt is not None:
            message = "is not used, because the program writes the messages; remove it"
            yield Problem(f"{name}.data_args.system_prompt", message, ("agent",))


def _broken_validation_rules(config: EpisodeConfig, validation: ValidationConfig | None) -> Iterator[Problem]:
    manager, name = config.val_env_manager, "val_env_manager"
    if manager is None:
        return
    if validation is None:
        yield Problem(name, "needs the validation block; remove one of them", ("validation",))
        return
    if "max_failed_fraction" in manager.model_fields_set:
        message = f"{manager.max_failed_fraction:g} is used only in training; set train_env_manager.max_failed_fraction"
        yield Problem(f"{name}.max_failed_fraction", message)
    sampling, data = validation.generating_args, validation.data_args
    same = {
        "num_env_groups": ("validation.data_args.num_rows", data.num_rows),
        "group_size": ("validation.generating_args.num_return_sequences", sampling.num_return_sequences),
    }
    yield from _broken_manager_rules(name, manager, tuple(config.custom_envs), same)
    yield from _broken_seed_rules(name, manager, "validation", data)


def _broken_seed_rules(name: str, manager: EnvManagerConfig, block: str, data: DataArgs) -> Iterator[Problem]:
    """Yield a partition of rows that are not seeds, or beside shares of the domains."""
    if manager.num_groups_partition is None:
        return
    if data.domain_interleave_probs is not None:
        other = f"{block}.data_args.domain_interleave_probs"
        yield Problem(f"{name}.num_groups_partition", f"sets the shares, and so does {other}; remove one", (other,))
    if data.file_name != (SEEDS,):
        message = f"divides seeds, and {block}.data_args.file_name names data; remove one of them"
        yield Problem(f"{name}.num_groups_partition", message, (f"{block}.data_args.file_name",))


def _broken_manager_rules(
    name: str, manager: EnvManagerConfig, known: Names, same: dict[str, tuple[str, int | None]]
) -> Iterator[Problem]:
    """Yield unknown tags, a wrong partition, and numbers that another key contradicts.

    Args:
        name: key of the block.
        manager: the block.
        known: blocks of `custom_envs`.
        same: key path and value of the other key that must have the value of a key of the block.
    """
    if strange := [tag for tag in manager.tags if tag not in known]:
        message = f"{', '.join(strange)} is no block of custom_envs ({', '.join(known)}); write it as there"
        yield Problem(f"{name}.tags", message, ("custom_envs",))
    for key, (other, number) in same.items():
        own = manager.num_env_groups if key == "num_env_groups" else manager.group_size
        if own is not None and number is not None and own != number:
            hint = " (it counts groups; in ROLL's agentic pipeline it counts episodes)" if "batch" in other else ""
            yield Problem(f"{name}.{key}", f"{own} is not {other} {number}{hint}; remove one of them", (other,))
    partition, tags = manager.num_groups_partition, manager.tags or known
    if partition is None:
        return
    if len(partition) != len(tags):
        message = f"{len(partition)} numbers for {len(tags)} environments ({', '.join(tags)}); give one for each"
        yield Problem(f"{name}.num_groups_partition", message, (f"{name}.tags",))
    elif manager.num_env_groups is not None and sum(partition) != manager.num_env_groups:
        message = f"the sum is {sum(partition)}, not num_env_groups {manager.num_env_groups}; change one"
        yield Problem(f"{name}.num_groups_partition", message, (f"{name}.num_env_groups",))
