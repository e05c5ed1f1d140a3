"""`reward_type` and `format_pattern`: they reach the worker that takes them, or are refused."""

from __future__ import annotations

import pytest
from composed import load_config
from config_problems import problem_of

from roll_gspo.config.reward_table import SHIPPED_REWARDS
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.rewards import multiple_choice, reward_spec
from roll_gspo.rewards.base import RewardRequest
from roll_gspo.rewards.spec import build_reward

BLOCK = "rewards.column_addition."


def block(*settings: str):
    return load_config("example_gspo", *(BLOCK + setting for setting in settings)).config.rewards["column_addition"]


def test_table_schema_and_rewards_have_the_same_keys_and_values() -> None:
    keys = {key for reward in SHIPPED_REWARDS.values() for key in reward.block_arguments}
    assert keys <= set(RewardConfig.model_fields)
    values = SHIPPED_REWARDS["crossthinkqa"].block_arguments["reward_type"]
    assert values == tuple(multiple_choice.REWARD_TYPES)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        (("worker_cls=crossthinkqa", "reward_type=loose"), {"reward_type": "loose"}),
        (("worker_cls=format", r"format_pattern='a+'", "worker_args.partial_credit=0"), {"format_pattern": "a+"}),
        (("worker_cls=math_rule",), {}),
        (("worker_cls=my.reward", "reward_type=hard"), {"reward_type": "hard"}),
    ],
)
def test_keys_become_arguments(settings, arguments) -> None:
    config = block("worker_args={}", *settings)
    assert config.arguments == {**config.worker_args, **arguments}


def test_worker_is_built_with_the_key() -> None:
    config = block("worker_args={}", "worker_cls=crossthinkqa", "reward_type=strict")
    reward = build_reward(reward_spec(config.worker_cls, config.arguments, "rewards.x"))
    assert reward(RewardRequest("", "The answer is B.", "B")).score == -1


@pytest.mark.parametrize(
    ("settings", "key", "values"),
    [
        (
            ("worker_cls=math_rule", "reward_type=soft"),
            "rewards.column_addition.reward_type",
            ("soft", "worker_cls", "ifeval", "crossthinkqa", "math_rule"),
        ),
        (
            ("worker_cls=ifeval", "format_pattern=think"),
            "rewards.column_addition.format_pattern",
            ("think", "format", "ifeval"),
        ),
        (
            ("worker_cls=ifeval", "reward_type=loose"),
            "rewards.column_addition.reward_type",
            ("loose", "ifeval", "soft", "hard"),
        ),
        (("worker_cls=ifeval", "reward_type=medium"), "rewards.column_addition.reward_type", ("medium",)),
        (
            ("worker_cls=ifeval", "reward_type=soft", "worker_args.reward_type=hard"),
            "rewards.column_addition.reward_type",
            ("worker_args.reward_type",),
        ),
    ],
)
def test_argument_that_the_worker_does_not_take_is_refused(settings, key, values) -> None:
    problem = problem_of(*(BLOCK + setting for setting in ("worker_args={}", *settings)))
    assert problem.key == key and problem.names(*values)
