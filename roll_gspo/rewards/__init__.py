"""Rewards: functions and classes that score responses, run in separate worker processes.

A reward is called with `(prompt, response, ground_truth, **row)` and returns a number or a `RewardOutput`.
"""

from __future__ import annotations

from roll_gspo.rewards.base import BatchReward, RewardOutput, RewardRequest, RewardResult
from roll_gspo.rewards.pool import RewardPool
from roll_gspo.rewards.routing import Router
from roll_gspo.rewards.spec import RewardSpec, reward_spec

__all__ = [
    "BatchReward",
    "RewardOutput",
    "RewardPool",
    "RewardRequest",
    "RewardResult",
    "RewardSpec",
    "Router",
    "reward_spec",
]
