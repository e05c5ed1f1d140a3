"""Versions of the packages that a configuration needs, and whether they fit together."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from roll_gspo.config.lora import PEFT
from roll_gspo.config.sft import AnyConfig
from roll_gspo.doctor.findings import Finding, Findings, error, ok, warning

_ROOT = "roll-gspo"
_ALWAYS = ("torch", "transformers", "triton", "transformer_engine", "numpy")


def installed_versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that install these modules, by the name of the package."""
    packages = metadata.packages_distributions()
    names = [name for module in modules for name in packages.get(module.partition(".")[0], ())]
    return {name: metadata.version(name) for name in dict.fromkeys(map(canonicalize_name, names))}


def requirements_of(package: str) -> list[str]:
    """Return the requirements in the metadata of a package; none if it is not installed, e.g. in a checkout."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def conflicts(
    versions: Mapping[str, str], requirements: Callable[[str], list[str]] = requirements_of
) -> Iterator[Finding]:
    """Yield packages whose version another one of them rules out."""
    for package in (_ROOT, *versions):
        for text in requirements(package):
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            if name not in versions or not _applies(needed, is_root=package == _ROOT):
                continue
            if not needed.specifier.contains(versions[name], prereleases=True):
                yield warning(
                    f"{package} {versions.get(package, '')}".rstrip()
                    + f" needs {name}{needed.specifier}, but {versions[name]} is installed; run "
                    f"pip install '{name}{needed.specifier}'"
                )


def _applies(requirement: Requirement, is_root: bool) -> bool:
    """Return whether a requirement holds on this machine. Those of every extra of this package count."""
    marker = requirement.marker
    if marker is None:
        return True
    extras = ["", *re.findall(r"extra == \"([^\"]+)\"", str(marker) if is_root else "")]
    return any(marker.evaluate({"extra": extra}) for extra in extras)


def version_findings(config: AnyConfig) -> Findings:
    """Report the versions in use and those that do not fit together."""
    modules = [*_ALWAYS, *(["ray"] if config.execution == "ray" else [])]
    requirements = (role.strategy_args.requirement for role in config.roles().values())
    modules += [requirement.module for requirement in requirements if requirement is not None]
    modules += [PEFT.module] if config.actor_train.model_args.lora is not None else []
    versions = installed_versions(modules)
    listed = [f"{name} {version}" for name, version in versions.items()]
    yield ok(f"Python {platform.python_version()}, {', '.join(listed)}")
    if sys.version_info < (3, 11):  # noqa: UP036 - a checkout can be run with any version
        yield error(f"Python {platform.python_version()} is too old; use 3.11 or later")
    yield from conflicts(versions)


def cuda_of_torch() -> tuple[int, int] | None:
    """Return the CUDA version that torch is built for, from its files; None for a CPU build or if it is missing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*= '(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None
