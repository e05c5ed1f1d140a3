"""Names of rewards, and how one is built in the process that computes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.errors import ConfigError
from roll_gspo.registry import Registry, did_you_mean, import_target
from roll_gspo.rewards.base import BatchReward, RewardRequest
from roll_gspo.rewards.composition import Combine, Composition, Part

REWARDS = Registry(
    "worker_cls",
    {
        "code_sandbox": "roll_gspo.rewards.code_sandbox:CodeSandbox",
        "crossthinkqa": "roll_gspo.rewards.multiple_choice:CrossThinkQa",
        "exact_match": "roll_gspo.rewards.exact_match:ExactMatch",
        "format": "roll_gspo.rewards.format:Format",
        "ifeval": "roll_gspo.rewards.ifeval:IfEval",
        "length": "roll_gspo.rewards.length:Length",
        "llm_judge": "roll_gspo.rewards.llm_judge.judge:LlmJudge",
        "math_rule": "roll_gspo.rewards.math_rule:MathRule",
        "multiple_choice_boxed": "roll_gspo.rewards.multiple_choice:MultipleChoiceBoxed",
        "reward_model": "roll_gspo.rewards.reward_model:RewardModel",
    },
)

# So that YAML files written for ROLL run as they are.
_ROLL = "roll.pipeline.rlvr.rewards."
ROLL_WORKERS = {
    f"{_ROLL}code_sandbox_reward_worker.CodeSandboxRewardWorker": "code_sandbox",
    f"{_ROLL}crossthinkqa_rule_reward_worker.CrossThinkQARuleRewardWorker": "crossthinkqa",
    f"{_ROLL}ifeval_rule_reward_worker.GeneralRuleRewardWorker": "ifeval",
    f"{_ROLL}llm_judge_reward_worker.LLMJudgeRewardWorker": "llm_judge",
    f"{_ROLL}math_rule_reward_worker.MathRuleRewardWorker": "math_rule",
    f"{_ROLL}multiple_choice_boxed_rule_reward_worker.MultipleChoiceBoxedRuleRewardWorker": "multiple_choice_boxed",
}

_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NUM_TEXTS = 3  # prompt, response, ground_truth


@dataclass(frozen=True)
class RewardSpec:
    """A reward that is not built yet; it pickles.

    Attributes:
        name: as the user knows it.
        target: `package.module:attribute` of a function or a class whose instances are called.
        arguments: of the class, or further keyword arguments of the function.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartSpec:
    """One part of a composition that is not built yet; the fields are those of `composition.Part`."""

    reward: RewardSpec
    weight: float
    threshold: float


@dataclass(frozen=True)
class CompositionSpec(RewardSpec):
    """A reward made of others, which are built in the same process.

    Attributes:
        combine, else_score: as in the YAML.
        parts: by name, in order.
    """

    combine: Combine = "weighted_sum"
    parts: Mapping[str, PartSpec] = field(default_factory=dict)
    else_score: float = 0.0


def reward_spec(worker_cls: str, arguments: Mapping[str, Any], where: str) -> RewardSpec:
    """Resolve a shipped name, a worker class of ROLL that has a counterpart, or the dotted path of a user's own.

    Nothing of the user's is imported here, but in the worker processes: see `RewardPool.check`.

    Args:
        worker_cls: as in the YAML.
        arguments: `worker_args`.
        where: key path of the reward's block, for errors.

    Raises:
        ConfigError: the name is unknown, or ROLL's worker has no counterpart yet.
    """
    name = ROLL_WORKERS.get(worker_cls, worker_cls)
    if name in REWARDS:
        return RewardSpec(name, REWARDS[name], dict(arguments))
    known = ", ".join(sorted(REWARDS))
    if name.startswith("roll."):
        raise ConfigError(
            f"{where}.worker_cls: ROLL's '{name}' is not supported yet (its counterparts: {', '.join(ROLL_WORKERS)}); "
            f"use {known} or the dotted path of your own function"
        )
    if "." not in name and ":" not in name:
        raise ConfigError(
            f"{where}.worker_cls: unknown reward '{name}'{did_you_mean(name, list(REWARDS))} (known: {known}); "
            "or give the dotted path of your own function"
        )
    return RewardSpec(name, name, dict(arguments))


def build_reward(spec: RewardSpec) -> Callable[[RewardRequest], Any] | BatchReward:
    """Import and build a reward; the result takes a request, or several of them, and returns what the reward returns.

    A reward without `**row` is given only the columns that it names.

    Raises:
        ConfigError: the target does not exist, cannot be called, or does not take the arguments.
        MissingDependencyError: a package that it imports is not installed.
    """
    if isinstance(spec, CompositionSpec):
        parts = {
            name: Part(_one_by_one(build_reward(p.reward)), p.weight, p.threshold) for name, p in spec.parts.items()
        }
        return Composition(spec.combine, parts, spec.else_score)
    target = import_target(spec.target, f"reward {spec.name}")
    arguments = dict(spec.arguments)
    if inspect.isclass(target):
        signature = inspect.signature(target)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"reward {spec.name}: {error}; its arguments are {signature}") from error
        target, arguments = target(**arguments), {}
    if isinstance(target, BatchReward):
        return target
    if not callable(target):
        kind = type(target).__name__
        raise ConfigError(f"reward {spec.name}: {spec.target} is a {kind}; name a function or a class")
    parameters = list(inspect.signature(target).parameters.values())
    columns = {p.name for p in parameters[_NUM_TEXTS:] if p.kind in _BY_KEYWORD}
    # Not even a reward with `**row`: a misspelt argument would vanish among the columns.
    if unknown := sorted(arguments.keys() - columns):
        taken = ", ".join(sorted(columns)) or "none"
        raise ConfigError(f"reward {spec.name}: it has no argument {', '.join(unknown)}; its arguments: {taken}")
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    taken_already = {*arguments, *(p.name for p in parameters[:_NUM_TEXTS])}

    def reward(request: RewardRequest) -> Any:
        row = {k: v for k, v in request.row.items() if (takes_all or k in columns) and k not in taken_already}
        return target(request.prompt, request.response, request.ground_truth, **row, **arguments)

    return reward


def _one_by_one(reward: Callable[[RewardRequest], Any] | BatchReward) -> Callable[[RewardRequest], Any]:
    """A part of a composition is asked about one sample at a time."""
    if isinstance(reward, BatchReward):
        return lambda request: reward.score_batch([request])[0]
    return reward
