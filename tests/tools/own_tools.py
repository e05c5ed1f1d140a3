"""Tools for the tests of the environment. Worker processes import this module."""

from __future__ import annotations

import threading
import time
from typing import Annotated, Literal

from pydantic import Field


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> dict[str, object]:
    """Look up the weather.

    It is always warm.

    Args:
        city: name of the city,
            e.g. Bern.
        days: number of days.
    """
    return {"city": city, "days": days, "degrees": 20, "unit": unit}


class Waiter:
    """Waits for other calls of the same turn, so that it needs them to run at the same time."""

    def __init__(self, together: int = 1) -> None:
        self._barrier = threading.Barrier(together)

    def __call__(self, seconds: Annotated[float, Field(ge=0, description="how long")] = 0) -> str:
        self._barrier.wait(timeout=20)
        time.sleep(seconds)
        return f"waited {seconds:g}"


def failing(kind: str) -> str:
    """Raise an exception."""
    raise {"value": ValueError, "key": KeyError, "broken": RuntimeError}[kind]("no \ud800 result")


def keywords(**arguments: object) -> object:
    """Return its arguments."""
    return arguments


def positional(*numbers: int) -> int:
    """Add numbers."""
    return sum(numbers)


async def awaited(text: str) -> str:
    """Return a text, later."""
    return text
