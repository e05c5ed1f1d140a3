"""Roles whose calls can be profiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from roll_gspo.tracking.profiler import TraceTarget, record_trace

ParamsT = ParamSpec("ParamsT")
ReturnT = TypeVar("ReturnT")
RoleT = TypeVar("RoleT", bound="ProfiledRole")


class ProfiledRole:
    """A role that records a trace of each call of a `@profiled` method while a target is set."""

    _target: TraceTarget | None = None
    _num_calls = 0

    def profile(self, target: TraceTarget | None) -> None:
        """Record the calls of one step; None stops recording."""
        self._target, self._num_calls = target, 0

    def next_trace(self, method: str) -> Path | None:
        """Return the file for the trace of the next call, or None if none is to be recorded."""
        if self._target is None:
            return None
        self._num_calls += 1
        return self._target.path(self._num_calls, method)


def profiled(
    method: Callable[Concatenate[RoleT, ParamsT], ReturnT],
) -> Callable[Concatenate[RoleT, ParamsT], ReturnT]:
    """Make a method of a `ProfiledRole` record its calls."""

    @wraps(method)
    def recorded(self: RoleT, *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ReturnT:
        path = self.next_trace(method.__name__)
        if path is None:
            return method(self, *args, **kwargs)
        with record_trace(path):
            return method(self, *args, **kwargs)

    return recorded
