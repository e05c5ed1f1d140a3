"""Every role in this process: no cluster, no pickling, and a debugger works."""

from __future__ import annotations

import logging
from collections.abc import Callable

from roll_gspo.execution.base import Closeable, RoleT

logger = logging.getLogger(__name__)


class LocalExecutor:
    """`Executor` that builds roles right here."""

    def __init__(self) -> None:
        self._roles: list[tuple[str, Closeable]] = []

    def start(self, name: str, make: Callable[[], RoleT]) -> RoleT:
        """Build the role in this process."""
        role = make()
        self._roles.append((name, role))
        return role

    def close(self) -> None:
        """Close every role, the last started first."""
        while self._roles:
            name, role = self._roles.pop()
            try:
                role.close()
            except Exception:
                logger.exception("closing %s failed", name)
