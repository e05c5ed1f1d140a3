"""The environment of `episodes.py`: a tool that takes a while. Worker processes import this module."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

from roll_gspo.environments import Environment, Reply, Start


class SlowTool(Environment):
    """Returns a result after a random time.

    Args:
        longest_s: largest time in seconds; times are uniform from 0.
        num_turns: answers of the model per episode.
    """

    def __init__(self, longest_s: float, num_turns: int) -> None:
        self._longest_s = longest_s
        self._turns_left = num_turns
        self._random = random.Random()

    def reset(self, row: Mapping[str, Any], seed: int) -> Start:
        """Begin with a question."""
        self._random = random.Random(seed)
        return Start(({"role": "user", "content": f"Question {seed}"},))

    def step(self, answer: str) -> Reply:
        """Wait, and return a result."""
        time.sleep(self._random.uniform(0, self._longest_s))
        self._turns_left -= 1
        return Reply(({"role": "user", "content": "The result of the tool is 42."},), done=not self._turns_left)
