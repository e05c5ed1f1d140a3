"""An OpenEnv server of the tests, on the port that is its argument, and functions for its texts."""

from __future__ import annotations

import sys
import time
from typing import Any


def add(text: str) -> dict[str, Any] | None:
    """Return the action of a text."""
    return {"number": int(text)} if text.removeprefix("-").isdigit() else None


def total(observation: dict[str, Any]) -> str:
    """Return the text of an observation."""
    return f"total {observation['total']}"


def main(port: int) -> None:
    """Serve an environment that adds numbers until it reaches its goal."""
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Number(Action):
        number: int

    class Total(Observation):
        total: int

    class Counter(Environment[Number, Total, State]):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, goal: int = 10, **_: Any) -> Total:
            self.total, self.goal = seed or 0, goal
            return Total(total=self.total)

        def step(self, action: Number, timeout_s: float | None = None, **_: Any) -> Total:
            if action.number == 666:
                raise ValueError("not this number")
            if action.number == 60:
                time.sleep(60)
            self.total += action.number
            return Total(total=self.total, reward=float(self.total == self.goal), done=self.total >= self.goal)

        @property
        def state(self) -> State:
            return State()

    uvicorn.run(create_fastapi_app(Counter, Number, Total, max_concurrent_envs=8), port=port, log_level="error")


if __name__ == "__main__":
    main(int(sys.argv[1]))
