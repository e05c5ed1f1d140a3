"""The block of the configuration that chooses which steps are profiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveInt

from roll_gspo.config.base import Problem, Schema


def _window(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TorchProfilerConfig(Schema):
    """Traces by `torch.profiler`."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_window)]
    """First and last step to profile."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield a window that ends before it begins."""
        yield from super().broken_rules()
        first, last = self.steps
        if last < first:
            yield Problem("steps", f"the last step {last} is before the first step {first}; swap them")


class ProfilerConfig(Schema):
    """Profilers of the roles that hold a model."""

    torch: TorchProfilerConfig | None = None
    """Record a trace of every call of a role with `torch.profiler`."""
