"""Cache of judge answers in one SQLite file, shared by several processes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError

FILE_NAME = "llm_judge.sqlite"
_BUSY_TIMEOUT_S = 30.0
_SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, hits INTEGER NOT NULL)"


class AnswerCache:
    """Maps requests (model, messages, parameters) to answers.

    SQLite locks the file, so that processes of one machine can share it. If a statement fails (disk full, or locked for
    30 s), the cache prints a warning once and is disabled; samples do not fail.

    Args:
        folder: folder of the file `llm_judge.sqlite`; created if it does not exist.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, folder: str) -> None:
        self._file = Path(folder) / FILE_NAME
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self._file, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"llm_judge: cache_dir: cannot open {self._file} ({error}); choose another folder"
            ) from error
        self._enabled = True

    def get(self, request: Mapping[str, Any]) -> str | None:
        """Return the cached answer and count the hit, or return None."""
        key = _digest(request)
        rows = self._run("SELECT answer FROM answers WHERE key = ?", (key,))
        if not rows:
            return None
        self._run("UPDATE answers SET hits = hits + 1 WHERE key = ?", (key,))
        return str(rows[0][0])

    def put(self, request: Mapping[str, Any], answer: str) -> None:
        """Store an answer unless the request already has one."""
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?, 0)", (_digest(request), answer))

    def counts(self) -> tuple[int, int]:
        """Return (number of answers, number of hits) over all processes."""
        rows = self._run("SELECT COUNT(*), COALESCE(SUM(hits), 0) FROM answers", ())
        return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)

    def _run(self, statement: str, values: tuple[str, ...]) -> list[tuple[Any, ...]]:
        if not self._enabled:
            return []
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._enabled = False
            print(f"llm_judge: the cache {self._file} is disabled: {error}", file=sys.stderr, flush=True)
            return []


def _digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
