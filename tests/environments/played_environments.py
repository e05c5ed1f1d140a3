"""Environments for the tests of the pool. Worker processes import this module."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from roll_gspo.environments import Environment, Reply, Start


class Echo(Environment):
    """Repeats what it hears. Some answers make it fail."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._turns = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        if row.get("fails"):
            raise ValueError("no such level")
        return Start(({"role": "user", "content": f"{self._prefix}{row.get('text', '')} {seed}"},))

    def step(self, answer: str) -> Reply:
        self._turns += 1
        if answer.startswith("sleep"):
            time.sleep(float(answer.split()[1]))
        actions = {"raise": self._raise, "die": lambda: os._exit(3), "exit": self._exit}
        actions.get(answer, lambda: None)()
        if answer == "empty":
            return Reply()
        if answer == "number":
            return Reply(reward=float("nan"), done=True)
        if answer == "wrong":
            return "text"  # type: ignore[return-value]
        return Reply(({"role": "user", "content": answer},), reward=self._turns, metrics={"length": len(answer)})

    def _raise(self) -> None:
        raise RuntimeError("broken")

    def _exit(self) -> None:
        raise SystemExit(1)


class Installation(Environment):
    """Tells which Python runs it, and whether a package of it can be imported."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        found = importlib.util.find_spec(row["package"])
        return Start(({"role": "user", "content": f"{sys.prefix} {found is not None}"},))

    def step(self, answer: str) -> Reply:
        return Reply(done=True)


class Unfinished(Environment):
    """Lacks `step`."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        return Start(({"role": "user", "content": ""},))


def function() -> None:
    """Is no environment."""
