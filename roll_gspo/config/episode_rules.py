"""Rules between the blocks of episodes and all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from roll_gspo.config.base import Names, Problem
from roll_gspo.config.environment_table import SEEDS
from roll_gspo.config.environments import EnvManagerConfig

if TYPE_CHECKING:
    from roll_gspo.config.experiment import ExperimentConfig


def broken_episode_rules(config: ExperimentConfig) -> Iterator[Problem]:
    """Yield missing blocks of rewards or environments, and keys that episodes cannot have."""
    manager, validation = config.train_env_manager, config.val_env_manager
    if manager is None:
        if not config.rewards:
            yield Problem("rewards", "no domain is configured; add at least one with its worker_cls")
        for key in ("custom_envs", "val_env_manager"):
            if config.__dict__[key]:
                yield Problem(key, "is used only with train_env_manager; add that block (it may be {})")
        return
    if not config.custom_envs:
        yield Problem("train_env_manager", "there is no environment; add custom_envs", ("custom_envs",))
    if config.rewards:
        names = ", ".join(config.rewards)
        message = f"{names} score responses of one turn, and environments give the rewards here; remove one block"
        yield Problem("rewards", message, ("train_env_manager",))
    if config.actor_train.router_replay.reads_rollout:
        message = "replays experts that were recorded in one turn, and an episode has several; set router_replay=none"
        yield Problem("actor_train.router_replay.mode", message, ("train_env_manager",))
    if config.tag_to_template:
        yield Problem("tag_to_template", "episodes have one template; set template", ("train_env_manager",))
    groups = ("rollout_batch_size", config.rollout_batch_size)
    size = ("num_return_sequences_in_group", config.num_return_sequences_in_group)
    same: dict[str, tuple[str, int | None]] = {"num_env_groups": groups, "group_size": size}
    known = tuple(config.custom_envs)
    yield from _broken_manager_rules("train_env_manager", manager, known, same)
    if validation is not None and config.validation is None:
        yield Problem("val_env_manager", "needs the validation block; remove one of them", ("validation",))
    elif validation is not None and config.validation is not None:
        same = {
            "num_env_groups": ("validation.data_args.num_rows", config.validation.data_args.num_rows),
            "group_size": (
                "validation.generating_args.num_return_sequences",
                config.validation.generating_args.num_return_sequences,
            ),
        }
        yield from _broken_manager_rules("val_env_manager", validation, known, same)
    yield from _broken_seed_rules(config)


def _broken_seed_rules(config: ExperimentConfig) -> Iterator[Problem]:
    """Yield a partition of rows that are not seeds."""
    managers = {"train_env_manager": config.train_env_manager, "val_env_manager": config.val_env_manager}
    for name, manager in managers.items():
        data = config.validation.data_args if config.validation and name[0] == "v" else config.actor_train.data_args
        if manager is not None and manager.num_groups_partition is not None and data.file_name != (SEEDS,):
            block = "validation" if name[0] == "v" else "actor_train"
            yield Problem(
                f"{name}.num_groups_partition",
                f"divides seeds, and {block}.data_args.file_name names data; remove one of them",
                (f"{block}.data_args.file_name",),
            )


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
