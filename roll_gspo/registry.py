"""Names to lazily imported factories: nothing is imported before it is named."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from roll_gspo.errors import ConfigError, MissingDependencyError


def did_you_mean(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest other name, or the empty string."""
    known = [k for k in known if k != name]
    prefixed = [k for k in known if k.startswith(name) or name.startswith(k)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or prefixed[:1]
    return f"; did you mean '{near[0]}'?" if near else ""


def is_dotted_path(name: str) -> bool:
    """Return whether `name` is the path of an attribute, e.g. `my_package.module.attribute` or `module:attribute`."""
    return bool({".", ":"} & set(name))


def import_target(path: str, what: str) -> Any:
    """Import `package.module:attribute` (or `package.module.attribute`).

    Raises:
        MissingDependencyError: a third-party package that the module imports is not installed.
        ConfigError: the module or the attribute does not exist.
    """
    module_name, separator, attribute = path.partition(":")
    if not separator:
        module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not module_name or (module_name + ".").startswith(missing + "."):
            raise ConfigError(f"{what}: no module '{module_name}' (from '{path}')") from error
        raise MissingDependencyError(
            f"{what} needs the package '{missing}': pip install {missing}", name=missing
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(f"{what}: module '{module_name}' has no '{attribute}'") from error


class Registry(Mapping[str, str]):
    """A table `name -> "package.module:attribute"` of one kind of component.

    Besides the shipped names, every lookup accepts the dotted path of a user's component (`my_package.module.attribute`
    or `my_module:attribute`).

    Args:
        kind: the YAML key whose values are the names; errors start with it.
        targets: the shipped names.
    """

    def __init__(self, kind: str, targets: dict[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)

    def __getitem__(self, name: str) -> str:
        if name not in self._targets:
            if is_dotted_path(name):
                return name
            known = ", ".join(sorted(self._targets))
            hint = did_you_mean(name, list(self._targets))
            raise ConfigError(f"{self.kind}: unknown name '{name}'{hint} (known: {known})")
        return self._targets[name]

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def register(self, name: str, target: str) -> None:
        """Add a user's `package.module:attribute`; a name that is taken is an error."""
        if name in self._targets:
            raise ConfigError(f"{self.kind}: '{name}' is already {self._targets[name]}")
        self._targets[name] = target

    def load(self, name: str) -> Any:
        """Import and return what `name` stands for."""
        return import_target(self[name], f"{self.kind}: {name}")
