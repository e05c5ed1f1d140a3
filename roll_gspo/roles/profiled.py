"""Roles whose calls can be profiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from roll_gspo.tracking.profiler import TraceTarget, record_trace

ParamsT = ParamSpec("ParamsT")
ReturnT = TypeVar("ReturnT")
RoleT = TypeVar("RoleT", bound="ProfiledRole")


class Profilable(Protocol):
    """A role in this process or in others."""

    def profile(self, target: TraceTarget | None) -> None:
        """Record a trace of each call of a `@profiled` method; None stops recording."""
        ...


class ProfiledRole(Profilable):
    """A role whose `@profiled` methods record a trace of each call while a target is set."""

    _target: TraceTarget | None = None
    _num_calls = 0

    def profile(self, target: TraceTarget | None) -> None:
        self._target, self._num_calls = target, 0

    def next_trace(self, method: str) -> Path | None:
        """Return the file for the trace of a call that begins, None if it is not recorded."""
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
