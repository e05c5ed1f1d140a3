"""Answers of judges that were paid for already, in one SQLite file that several processes share."""

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
    """Answers by a digest of the request (model, messages, parameters).

    SQLite's own locks make it safe for processes of one machine. A cache that fails (disk full, lock not had within
    30 s) costs requests, not samples: it says so once on stderr and is not asked again.

    Args:
        folder: made where it is missing; the file in it is `llm_judge.sqlite`.

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
                f"llm_judge: cache_dir: cannot open {self._file}: {error}; name another folder"
            ) from error
        self._usable = True

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The answer to the same request, if there was one; counts the hit."""
        key = _digest(request)
        rows = self._run("SELECT answer FROM answers WHERE key = ?", (key,))
        if not rows:
            return None
        self._run("UPDATE answers SET hits = hits + 1 WHERE key = ?", (key,))
        return str(rows[0][0])

    def put(self, request: Mapping[str, Any], answer: str) -> None:
        """Keep an answer; the first one stays."""
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?, 0)", (_digest(request), answer))

    def counts(self) -> tuple[int, int]:
        """(answers kept, hits so far), of all processes."""
        rows = self._run("SELECT COUNT(*), COALESCE(SUM(hits), 0) FROM answers", ())
        return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)

    def _run(self, statement: str, values: tuple[str, ...]) -> list[tuple[Any, ...]]:
        if not self._usable:
            return []
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._usable = False
            print(f"llm_judge: the cache {self._file} is no longer used: {error}", file=sys.stderr, flush=True)
            return []


def _digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
