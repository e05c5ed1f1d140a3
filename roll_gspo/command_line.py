"""Command-line arguments before Hydra reads them: unknown options, and settings of Hydra that would run code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydra_app
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from roll_gspo.errors import ConfigError
from roll_gspo.registry import did_you_mean

# Hydra unpickles the file of --experimental-rerun.
REFUSED_OPTIONS = {"--experimental-rerun": "it would run code from the file that it names; give the overrides instead"}
OWN_OPTIONS = ("--dry-run", "--jobs", "-h")
OPTIONS_WITH_VALUE = (
    *("--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp", "--cfg", "-c"),
    *("--package", "-p", "--jobs"),
)
# Settings of Hydra that cannot run code. Its other settings build objects from any class or function that they name.
HARMLESS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.", "hydra.output_subdir", "hydra.searchpath", "hydra.mode")
CORE_PLUGINS = "hydra._internal.core_plugins."


def flags_and_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split `--flag [value]` from `key=value`, because Hydra rejects overrides on both sides of a flag."""
    flags: list[str] = []
    overrides: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_value = previous in OPTIONS_WITH_VALUE or (previous in ("--info", "-i") and "=" not in argument)
        (flags if is_value or argument.startswith("-") else overrides).append(argument)
    return flags, overrides


def check_arguments(arguments: list[str]) -> None:
    """Check that all options are known and that no setting of Hydra would run code.

    Raises:
        ConfigError: lists every problem.
    """
    flags, overrides = flags_and_overrides(arguments)
    problems = [*_option_problems(flags), *_override_problems(overrides)]
    if problems:
        raise ConfigError("\n".join(problems))


def _option_problems(flags: list[str]) -> Iterator[str]:
    parser = get_args_parser()
    known = sorted({*parser._option_string_actions, *OWN_OPTIONS} - {*REFUSED_OPTIONS})
    for flag, value in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, inline = flag.partition("=")
        if not name.startswith("-"):
            continue  # the value of an option
        if name in REFUSED_OPTIONS:
            yield f"{name}: {REFUSED_OPTIONS[name]}"
        elif name not in known:
            long = [option for option in known if option.startswith("--")]
            yield f"{name}: unknown option{did_you_mean(name, long)} (known: {', '.join(long)})"
        elif name in OPTIONS_WITH_VALUE and not (inline if equals else value and not value.startswith("-")):
            yield f"{name}: its value is missing; write {name} VALUE"
        elif name in ("--config-dir", "-cd") and not Path(inline if equals else value).is_dir():
            yield f"{name}: no folder '{inline if equals else value}'; give the folder of your YAML files"


def _override_problems(overrides: list[str]) -> Iterator[str]:
    for override in overrides:
        key, equals, _ = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            yield f"'{override}': expected key=value, e.g. max_steps=10; write it so, or remove it"
        elif (key.startswith(("hydra.", "hydra/")) and not key.startswith(HARMLESS_OF_HYDRA)) or key == "hydra":
            yield f"{key}: is refused, because settings of Hydra can run any code; remove it"


def override_problem(error: Exception) -> str:
    """Describe an override that Hydra rejects; other errors are given as Hydra words them."""
    text = " ".join(str(error.__cause__ or error).split())
    if isinstance(error, OverrideParseException):
        problem = str(error).splitlines()[0]
        return f"command line ({error.override}): cannot be parsed ({problem}); put special characters in quotes"
    if match := re.match(r"Could not override '([^'@]+)", text):
        group = match[1]
        return (
            f"{group}: the defaults of this configuration name no option of the group {group}, so there is none to "
            f"replace; write +{group}=OPTION to add one, or '- {group}: OPTION' in its defaults list"
        )
    if match := re.search(r"Key '([^']+/[^']+)' is not in struct", text):
        return f"{match[1]}: there is no such config group; separate the parts of a key by dots"
    return text


class _NoCallbacks(Callbacks):
    """The place where Hydra would build callbacks of a composed configuration; files may name them too."""

    def __init__(self, config: DictConfig | None = None) -> None:
        if config is not None:
            block = OmegaConf.to_container(config.hydra, resolve=False)
            assert isinstance(block, dict)
            if problems := list(_code_in(block)):
                raise ConfigError("\n".join(problems))
        super().__init__(None)


def _code_in(block: Mapping[Any, Any]) -> Iterator[str]:
    """Yield settings of Hydra in files that would run code."""
    if block["callbacks"]:
        yield f"hydra.callbacks: {', '.join(block['callbacks'])} would run code; remove it from the configuration file"
    for name in ("launcher", "sweeper"):
        part = dict(block[name] or {})
        if not str(part.pop("_target_", "")).startswith(CORE_PLUGINS) or _names_target(part):
            yield f"hydra.{name}: it would run code; remove it from the configuration file"
    if (block["job_logging"] or {}).get("root") is not None:
        yield "hydra.job_logging: it would run code; remove it from the configuration file"


def _names_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_target, value.values()))
    return isinstance(value, list) and any(map(_names_target, value))


def forbid_callbacks() -> None:
    """Let Hydra check a composed configuration where it would build callbacks. It has no hook before that."""
    hydra_app.Callbacks = _NoCallbacks  # type: ignore[misc]
