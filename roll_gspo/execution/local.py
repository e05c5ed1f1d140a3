"""All roles in this process: no cluster, no pickling, and a debugger works."""

from __future__ import annotations

import logging
from collections.abc import Callable

from roll_gspo.execution.base import Closeable, Devices, ExecutionSettings, RoleT

logger = logging.getLogger(__name__)


class LocalExecutor:
    """`Executor` that builds roles in this process.

    Args:
        settings: unused; the signature is that of all executors.
    """

    def __init__(self, settings: ExecutionSettings | None = None) -> None:
        self._roles: list[tuple[str, Closeable]] = []

    def start(self, name: str, make: Callable[[], RoleT], devices: Devices | None = None) -> RoleT:
        """Build the role in this process; `devices` is ignored."""
        role = make()
        self._roles.append((name, role))
        return role

    def close(self) -> None:
        """Close every role in reverse order of start."""
        close_all(self._roles)


def close_all(roles: list[tuple[str, Closeable]]) -> None:
    """Close and remove (name, role) pairs in reverse order; exceptions are logged."""
    while roles:
        name, role = roles.pop()
        try:
            role.close()
        except Exception:
            logger.exception("closing %s failed", name)
