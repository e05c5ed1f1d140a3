"""The shipped rewards, one entry each. This module does not import pydantic, because worker processes import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from roll_gspo.registry import did_you_mean


@dataclass(frozen=True)
class ShippedReward:
    """A reward that is shipped with the package.

    Attributes:
        target: `package.module:attribute` of its class.
        roll_worker: module and class of the ROLL worker that it replaces, below `roll.pipeline.rlvr.rewards`.
        block_arguments: keys of a reward block that are arguments of the reward, with their allowed values. Empty
            values allow any.
        timeout_s: default of `timeout_s` in a block with this reward; None for the default of the schema.
    """

    target: str
    roll_worker: str | None = None
    block_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    timeout_s: float | None = None


SHIPPED_REWARDS: dict[str, ShippedReward] = {
    "code_sandbox": ShippedReward(
        "roll_gspo.rewards.code_sandbox:CodeSandbox", "code_sandbox_reward_worker.CodeSandboxRewardWorker"
    ),
    "crossthinkqa": ShippedReward(
        "roll_gspo.rewards.multiple_choice:CrossThinkQa",
        "crossthinkqa_rule_reward_worker.CrossThinkQARuleRewardWorker",
        {"reward_type": ("loose", "soft", "strict")},
    ),
    "exact_match": ShippedReward("roll_gspo.rewards.exact_match:ExactMatch"),
    "format": ShippedReward("roll_gspo.rewards.format:Format", block_arguments={"format_pattern": ()}),
    "ifeval": ShippedReward(
        "roll_gspo.rewards.ifeval:IfEval",
        "ifeval_rule_reward_worker.GeneralRuleRewardWorker",
        {"reward_type": ("soft", "hard")},
    ),
    "length": ShippedReward("roll_gspo.rewards.length:Length"),
    "llm_judge": ShippedReward(
        "roll_gspo.rewards.llm_judge.judge:LlmJudge",
        "llm_judge_reward_worker.LLMJudgeRewardWorker",
        timeout_s=330.0,  # above the default deadline_s of the judge, 300
    ),
    "math_rule": ShippedReward("roll_gspo.rewards.math_rule:MathRule", "math_rule_reward_worker.MathRuleRewardWorker"),
    "multiple_choice_boxed": ShippedReward(
        "roll_gspo.rewards.multiple_choice:MultipleChoiceBoxed",
        "multiple_choice_boxed_rule_reward_worker.MultipleChoiceBoxedRuleRewardWorker",
    ),
    "reward_model": ShippedReward("roll_gspo.rewards.reward_model:RewardModel", timeout_s=120.0),
}

_ROLL_PREFIX = "roll.pipeline.rlvr.rewards."
_NAME_OF_ROLL_WORKER = {_ROLL_PREFIX + r.roll_worker: name for name, r in SHIPPED_REWARDS.items() if r.roll_worker}


def shipped_name(worker_cls: str) -> str:
    """Return the shipped reward that replaces a ROLL worker; other names are returned unchanged."""
    return _NAME_OF_ROLL_WORKER.get(worker_cls, worker_cls)


def resolve_reward(worker_cls: str) -> str:
    """Return the name of a shipped reward, or the dotted path of a user's reward.

    Args:
        worker_cls: shipped name, worker class of ROLL, or dotted path.

    Raises:
        ValueError: the name is unknown, or no shipped reward replaces the ROLL worker.
    """
    name = shipped_name(worker_cls)
    known = ", ".join(SHIPPED_REWARDS)
    if name.startswith("roll."):
        raise ValueError(
            f"ROLL's {name.rpartition('.')[2]} is not supported; use {known} or the dotted path of your own reward"
        )
    if name not in SHIPPED_REWARDS and not {".", ":"} & set(name):
        hint = did_you_mean(name, list(SHIPPED_REWARDS))
        raise ValueError(f"unknown reward '{name}'{hint} (known: {known}, or the dotted path of your own reward)")
    return name
