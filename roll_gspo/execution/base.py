"""The interface between a pipeline and the place where its roles live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar


class Closeable(Protocol):
    """Anything that holds an engine or processes."""

    def close(self) -> None:
        """Free what it holds; calling it again does nothing."""
        ...


RoleT = TypeVar("RoleT", bound=Closeable)


class Executor(Protocol):
    """Starts roles and owns their lives; a role never knows which executor carries it."""

    def start(self, name: str, make: Callable[[], RoleT]) -> RoleT:
        """Build the role `name` where it is to live and return what answers its methods."""
        ...

    def close(self) -> None:
        """Close every role, the last started first, whatever one of them raises."""
        ...
