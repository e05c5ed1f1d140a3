"""Specs of environments: resolving a name, and building an environment in a worker process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from roll_gspo.config.environment_table import ENVIRONMENTS
from roll_gspo.environments.base import Environment
from roll_gspo.errors import ConfigError
from roll_gspo.registry import import_target


@dataclass(frozen=True)
class EnvironmentSpec:
    """Description of an environment that is not built yet. Instances can be pickled.

    Attributes:
        name: name in the configuration: a shipped environment, or the dotted path of a class.
        arguments: arguments of the class.
        python: interpreter of the worker processes; None: the one of this process.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None


def environment_factory(spec: EnvironmentSpec) -> Callable[[], Environment]:
    """Import an environment and return a function that builds it for one episode.

    Raises:
        ConfigError: the target does not exist, is no subclass of `Environment`, or does not accept the arguments.
        MissingDependencyError: a package that the target imports is not installed.
    """
    target = import_target(ENVIRONMENTS[spec.name], f"environment {spec.name}")
    if not (inspect.isclass(target) and issubclass(target, Environment)):
        raise ConfigError(f"environment {spec.name}: {target!r} is no subclass of roll_gspo.environments.Environment")
    if inspect.isabstract(target):
        missing = ", ".join(sorted(target.__abstractmethods__))
        raise ConfigError(f"environment {spec.name}: the class lacks {missing}; define these methods")
    has_own_factory = target.factory.__func__ is not Environment.factory.__func__
    signature = inspect.signature(target.factory if has_own_factory else target)
    try:
        signature.bind(**spec.arguments)
    except TypeError as error:
        raise ConfigError(f"environment {spec.name}: {error}; its signature is {signature}") from error
    return target.factory(**spec.arguments)
