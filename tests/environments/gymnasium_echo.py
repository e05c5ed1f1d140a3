"""A text environment of Gymnasium for the tests. Importing this module registers `Echo-v0` and `Wide-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium import spaces


class Echo(gymnasium.Env[str, str]):
    """Rewards an answer that repeats the word of the observation."""

    observation_space = spaces.Text(12)
    action_space = spaces.Text(8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.word = (options or {}).get("word") or f"word{self.np_random.integers(100)}"
        return self.word, {"hint": "repeat"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self.word, float(action == self.word), action == "bye", False, {"hint": "again"}


class Wide(Echo):
    """Has actions that are neither texts nor numbers."""

    action_space = spaces.Box(0.0, 1.0)  # type: ignore[assignment]


def shown(observation: str, info: dict[str, Any]) -> str:
    """Return the text of an observation."""
    return f"{info['hint']}: {observation}"


gymnasium.register("Echo-v0", Echo, max_episode_steps=3)
gymnasium.register("Wide-v0", Wide)
