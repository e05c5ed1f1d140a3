"""Looking up a named choice in one of the package's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def choose(table: Mapping[str, T], key: str, name: str) -> T:
    """What `name` stands for in `table`; `key` is the YAML key that heads the error.

    Raises:
        ValueError: there is no such name.
    """
    if name not in table:
        raise ValueError(f"{key}: unknown value '{name}'; use one of {', '.join(sorted(table))}")
    return table[name]
