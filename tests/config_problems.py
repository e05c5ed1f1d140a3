"""The problems that a configuration is refused with, parsed into where, key and message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from composed import load_config

from roll_gspo.errors import ConfigError

LINE = re.compile(r"(?:(?P<where>command line \(.*?\)|[^:]+:\d+): )?(?P<key>[\w.]+): (?P<message>.+)")


class ConfigProblem(NamedTuple):
    """One line of a ConfigError: `where: key: message`.

    Attributes:
        where: `file:line`, `command line (key=value)`, or '' if the key is written nowhere.
        key: the full dotted key.
        message: what is wrong and what to do.
    """

    where: str
    key: str
    message: str

    def names(self, *values: object) -> bool:
        """Return whether the message contains every value as a word (a key, a number, an option)."""
        return all(re.search(rf"(?<![\w.]){re.escape(str(value))}(?!\w)", self.message) for value in values)


def parse_problem(line: str) -> ConfigProblem:
    """Parse one line of a ConfigError."""
    match = LINE.fullmatch(line)
    assert match, f"not `where: key: message`: {line}"
    return ConfigProblem(match["where"] or "", match["key"], match["message"])


def problems_of(name: str, *overrides: str, config_dir: Path | None = None) -> list[ConfigProblem]:
    """Return the problems that a configuration is refused with, in the order of the message."""
    with pytest.raises(ConfigError) as caught:
        load_config(name, *overrides, config_dir=config_dir)
    return [parse_problem(line) for line in str(caught.value).splitlines()]


def problem_of(*overrides: str, name: str = "example_gspo", config_dir: Path | None = None) -> ConfigProblem:
    """Return the one problem that a configuration is refused with."""
    (problem,) = problems_of(name, *overrides, config_dir=config_dir)
    return problem


def derived_config(folder: Path, text: str) -> Path:
    """Write `mine.yaml`: example_gspo, and `text` from line 3 on. Return `folder`."""
    (folder / "mine.yaml").write_text(f"defaults: [example_gspo, _self_]\n\n{text}", encoding="utf-8")
    return folder
