"""Specs of rewards: resolving a name to a spec, and building a reward from a spec in a worker process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.config.reward_table import SHIPPED_REWARDS, resolve_reward
from roll_gspo.errors import ConfigError
from roll_gspo.registry import import_target
from roll_gspo.rewards.base import BatchReward, RewardRequest
from roll_gspo.rewards.composition import Combine, Composition, Part

_KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NUM_POSITIONAL = 3  # prompt, response, ground_truth


@dataclass(frozen=True)
class RewardSpec:
    """Description of a reward that is not built yet. Instances can be pickled.

    Attributes:
        name: name of the reward in the configuration.
        target: `package.module:attribute` of a function, or of a class whose instances are called.
        arguments: arguments of the class, or further keyword arguments of the function.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartSpec:
    """Description of one part of a composition; for the fields see `composition.Part`."""

    reward: RewardSpec
    weight: float
    threshold: float


@dataclass(frozen=True)
class CompositionSpec(RewardSpec):
    """Description of a reward that combines others, which are built in the same process.

    Attributes:
        combine: how the scores of the parts are combined; see `Composition`.
        parts: parts by name, in order of evaluation.
        else_score: score of a response that does not pass the gate.
    """

    combine: Combine = "weighted_sum"
    parts: Mapping[str, PartSpec] = field(default_factory=dict)
    else_score: float = 0.0


def reward_spec(worker_cls: str, arguments: Mapping[str, Any], key: str) -> RewardSpec:
    """Resolve the name of a reward: a shipped name, a worker class of ROLL, or the dotted path of a user's reward.

    A user's reward is imported in the worker processes only (see `RewardPool.check`).

    Args:
        worker_cls: name of the reward.
        arguments: arguments of the reward (`worker_args`).
        key: key path of the reward's block, for error messages.

    Raises:
        ConfigError: the name is unknown, or no shipped reward replaces the ROLL worker.
    """
    try:
        name = resolve_reward(worker_cls)
    except ValueError as error:
        raise ConfigError(f"{key}.worker_cls: {error}") from None
    target = SHIPPED_REWARDS[name].target if name in SHIPPED_REWARDS else name
    return RewardSpec(name, target, dict(arguments))


def build_reward(spec: RewardSpec) -> Callable[[RewardRequest], Any] | BatchReward:
    """Import and build a reward.

    Returns:
        A function of one request, or a `BatchReward`. A reward without `**row` receives only the columns that its
        parameters name.

    Raises:
        ConfigError: the target does not exist, is not callable, or does not accept the arguments.
        MissingDependencyError: a package that the target imports is not installed.
    """
    if isinstance(spec, CompositionSpec):
        parts = {
            name: Part(_unbatched(build_reward(p.reward)), p.weight, p.threshold) for name, p in spec.parts.items()
        }
        return Composition(spec.combine, parts, spec.else_score)
    target = import_target(spec.target, f"reward {spec.name}")
    arguments = dict(spec.arguments)
    if inspect.isclass(target):
        signature = inspect.signature(target)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"reward {spec.name}: {error}; its signature is {signature}") from error
        target, arguments = target(**arguments), {}
    if isinstance(target, BatchReward):
        _check_call(spec, target.score_batch, 1, "score_batch(requests)")
        return target
    if not callable(target):
        kind = type(target).__name__
        raise ConfigError(f"reward {spec.name}: {spec.target} is of type {kind}; name a function or a class")
    _check_call(spec, target, _NUM_POSITIONAL, "(prompt, response, ground_truth)")
    parameters = list(inspect.signature(target).parameters.values())
    columns = {p.name for p in parameters[_NUM_POSITIONAL:] if p.kind in _KEYWORD_KINDS}
    # Also checked for a reward with `**row`, where a misspelt argument would look like a column.
    if unknown := sorted(arguments.keys() - columns):
        known = ", ".join(sorted(columns)) or "none"
        raise ConfigError(f"reward {spec.name}: unknown argument {', '.join(unknown)} (known: {known}); correct it")
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    reserved = {*arguments, *(p.name for p in parameters[:_NUM_POSITIONAL])}
    required = {p.name for p in parameters if p.name in columns and p.default is p.empty} - arguments.keys()

    def reward(request: RewardRequest) -> Any:
        row = {k: v for k, v in request.row.items() if (takes_all or k in columns) and k not in reserved}
        if missing := required - row.keys():
            raise ConfigError(
                f"reward {spec.name}: no value for {', '.join(sorted(missing))}; set it in worker_args, give it a "
                f"default, or add a column of this name to the data (row {request.row.get('id', '?')} has none)"
            )
        return target(request.prompt, request.response, request.ground_truth, **row, **arguments)

    return reward


def _check_call(spec: RewardSpec, function: Any, num_positional: int, call: str) -> None:
    """Check that a reward can be called with its positional arguments and returns no coroutine."""
    for candidate in (function, inspect.getattr_static(type(function), "__call__", None)):
        if inspect.iscoroutinefunction(candidate) or inspect.isasyncgenfunction(candidate):
            raise ConfigError(
                f"reward {spec.name}: {spec.target} is async, but rewards are called as plain functions; remove async, "
                "or run the coroutine inside with asyncio.run"
            )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        return
    required = [
        p.name for p in list(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    ]
    try:
        signature.bind_partial(*(None,) * num_positional, **dict.fromkeys(required))
    except TypeError as error:
        raise ConfigError(
            f"reward {spec.name}: cannot be called as {call}: {error}; its signature is {signature}"
        ) from error


def _unbatched(reward: Callable[[RewardRequest], Any] | BatchReward) -> Callable[[RewardRequest], Any]:
    """Return a function that scores one request, as parts of a composition do."""
    if isinstance(reward, BatchReward):
        return lambda request: reward.score_batch([request])[0]
    return reward
