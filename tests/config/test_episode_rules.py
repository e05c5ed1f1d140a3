"""Rules and defaults of the blocks of episodes."""

from __future__ import annotations

from collections import Counter

import pytest
from composed import load_config
from config_problems import problem_of

from roll_gspo.config.environment_table import SEEDS
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import DataError
from roll_gspo.pipelines.rlvr.datasets import columns_of, domains_of, read_datasets

NAME = "example_agentic_gspo"
MACHINE = "custom_envs.adding_machine"
INTERLEAVED = "+actor_train.data_args.domain_interleave_probs={adding_machine: 1}"


def load(*overrides: str) -> ExperimentConfig:
    return load_config(NAME, *overrides).config


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ((f"{MACHINE}.env_type=adding_machin",), f"{MACHINE}.env_type", ("did you mean 'adding_machine'?",)),
        (("+train_env_manager.tags=[maze]",), "train_env_manager.tags", ("maze", "adding_machine")),
        (("+rewards.x.worker_cls=exact_match",), "rewards", ("x", "environments give the rewards")),
        (
            ("+train_env_manager.group_size=4",),
            "train_env_manager.group_size",
            ("4", "in_group 8"),
        ),
        (("+train_env_manager.num_env_groups=256",), "train_env_manager.num_env_groups", ("256", "counts groups")),
        (("+train_env_manager.num_groups_partition=[1,2]",), "train_env_manager.num_groups_partition", ("2", "1")),
        (
            ("+train_env_manager.num_groups_partition=[32]", "actor_train.data_args.file_name=builtin:column_addition"),
            "train_env_manager.num_groups_partition",
            ("seeds", "actor_train.data_args.file_name"),
        ),
        (
            ("+train_env_manager.num_groups_partition=[32]", INTERLEAVED),
            "train_env_manager.num_groups_partition",
            ("actor_train.data_args.domain_interleave_probs",),
        ),
        (
            ("+val_env_manager.max_failed_fraction=0.1",),
            "val_env_manager.max_failed_fraction",
            ("0.1", "train_env_manager.max_failed_fraction"),
        ),
        (
            ("~custom_envs", "+agent.command=python", "+train_env_manager.world_size=2"),
            "train_env_manager.world_size",
            ("2", "agent.max_concurrent"),
        ),
        (("train_env_manager=null",), "custom_envs", ("train_env_manager",)),
        (
            ("+val_env_manager.num_env_groups=7", "validation.data_args.num_rows=8"),
            "val_env_manager.num_env_groups",
            ("7", "8"),
        ),
        (("model=tiny_qwen3_moe", "router_replay=R3"), "actor_train.router_replay.mode", ("router_replay=none",)),
    ],
)
def test_blocks_that_contradict_are_refused(overrides: tuple[str, ...], key: str, words: tuple[str, ...]) -> None:
    problem = problem_of(*overrides, name=NAME)
    assert problem.key == key
    assert all(word in problem.message for word in words), problem.message


def test_numbers_of_roll_fill_the_batch() -> None:
    drop = ("~rollout_batch_size", "~num_return_sequences_in_group", "~validation")
    training = "train_env_manager={num_env_groups: 16, group_size: 4, num_groups_partition: [12, 4], tags: [b, a]}"
    held_out = "+val_env_manager={num_env_groups: 6, group_size: 3, num_groups_partition: [4, 2]}"
    envs = "+custom_envs={a: {env_type: adding_machine}, b: {env_type: adding_machine}}"
    config = load("~custom_envs.adding_machine", envs, training, held_out, *drop)
    assert (config.rollout_batch_size, config.num_return_sequences_in_group) == (16, 4)
    assert config.domain_shares == {"b": 0.75, "a": 0.25}
    assert config.validation is not None
    assert config.validation.num_samples == 3
    rows = read_datasets(config)
    assert Counter(row.domain for row in rows.train) == {"a": 2048, "b": 2048}
    assert [row.domain for row in rows.validation] == ["a"] * 4 + ["b"] * 2
    seeds = {row.extra["seed"] for row in rows.train}
    assert seeds.isdisjoint(row.extra["seed"] for row in rows.validation)
    assert all(seed % 2 == 0 for seed in seeds)


def test_only_environments_that_are_played_are_domains() -> None:
    added = "+custom_envs.other={env_type: adding_machine, tag_included: [x]}"
    assert load(added, "+train_env_manager.tags=[other]").domain_tags == {"other": ("x",)}
    assert set(load(added).domain_tags) == {"adding_machine", "other"}


def test_data_files_may_give_the_rows() -> None:
    tagged = f"{MACHINE}.tag_included=[column_addition]"
    config = load("actor_train.data_args.file_name=builtin:column_addition", f"+{tagged}")
    rows = read_datasets(config).train
    assert domains_of(config, [row.columns for row in rows[:3]]) == ["adding_machine"] * 3
    columns = columns_of(config, rows[0])
    assert columns["messages"] == list(rows[0].messages)
    with pytest.raises(DataError, match=r"custom_envs: .*column_addition"):
        read_datasets(load("actor_train.data_args.file_name=builtin:column_addition", INTERLEAVED))


def test_seeds_need_an_environment() -> None:
    with pytest.raises(DataError, match=f"{SEEDS}: only environments read seeds"):
        read_datasets(load_config("example_gspo", f"actor_train.data_args.file_name={SEEDS}").config)
