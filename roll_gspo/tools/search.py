"""`search`: BM25 search in local text files, with the full-text index of SQLite."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from roll_gspo.errors import ConfigError

_TEXT_FIELDS = ("text", "contents", "content", "body")
_TITLE_FIELDS = ("title", "name", "id")
_TEXT_SUFFIXES = (".txt", ".md")
_WORD = re.compile(r"\w+")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_MAX_WORDS = 64
_WEIGHT_OF_TITLE = 2.0


class Search:
    """Searches documents by their words. Words are reduced to their English stems.

    Args:
        corpus: files or folders. A line of a `.jsonl` file is a document `{title, text}` (also `contents`, `content` or
            `body`). A paragraph of a `.txt` or `.md` file is a document with the name of the file as title.
        num_results: documents per search.
        max_chars: characters of each document that are shown.
    """

    def __init__(self, corpus: str | Sequence[str], num_results: int = 3, max_chars: int = 1000) -> None:
        self._num_results, self._max_chars = num_results, max_chars
        self._lock = threading.Lock()
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._index.execute(
            "CREATE VIRTUAL TABLE documents USING fts5(title, text, tokenize = 'porter unicode61 remove_diacritics 2')"
        )
        paths = [corpus] if isinstance(corpus, str) else corpus
        documents = (document for path in paths for document in _documents(Path(path)))
        with self._index:
            self._index.executemany("INSERT INTO documents VALUES (?, ?)", documents)
        if not self._index.execute("SELECT count(*) FROM documents").fetchone()[0]:
            raise ConfigError(f"search: corpus: {', '.join(paths) or 'nothing'} has no document; add some")

    def __call__(self, query: str) -> str:
        """Search a collection of documents and return those that fit best.

        Args:
            query: words to search for.
        """
        words = _WORD.findall(query)[:_MAX_WORDS]
        if not words:
            raise ValueError("the query has no words")
        expression = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            found = self._index.execute(
                "SELECT title, text FROM documents WHERE documents MATCH ? ORDER BY bm25(documents, ?, 1.0), rowid "
                "LIMIT ?",
                (expression, _WEIGHT_OF_TITLE, self._num_results),
            ).fetchall()
        if not found:
            return "no document has any of these words"
        return "\n\n".join(self._shown(number, *document) for number, document in enumerate(found, start=1))

    def _shown(self, number: int, title: str, text: str) -> str:
        cut = text if len(text) <= self._max_chars else f"{text[: self._max_chars]}..."
        return f"[{number}] {title}\n{cut}" if title else f"[{number}] {cut}"


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of the documents in a file, or in the files of a folder."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in (".jsonl", *_TEXT_SUFFIXES):
                yield from _documents(file)
        return
    if path.suffix not in (".jsonl", *_TEXT_SUFFIXES):
        raise ConfigError(f"search: corpus: {path} is no folder and no .jsonl, .txt or .md file; name one")
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _document(line, f"{path}:{number}")
            else:
                yield from ((path.stem, part.strip()) for part in _PARAGRAPHS.split(file.read()) if part.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"search: corpus: {path} cannot be read ({error}); correct the path or the file") from error


def _document(line: str, place: str) -> tuple[str, str]:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"search: corpus: {place}: invalid JSON ({error}); correct the line") from error
    fields = entry if isinstance(entry, dict) else {}
    text = next((fields[name] for name in _TEXT_FIELDS if isinstance(fields.get(name), str)), None)
    if text is None:
        raise ConfigError(f"search: corpus: {place}: no text; write {{title, text}} (or {', '.join(_TEXT_FIELDS[1:])})")
    title = next((str(fields[name]) for name in _TITLE_FIELDS if fields.get(name) is not None), "")
    return title, text
