"""Python logging during a run: all records into run.log, important ones also above the live panel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from roll_gspo.printable import printable

PROGRESS_LOGGER = "roll_gspo.progress"
"""Marks records that the console formats itself; screen handlers skip them."""


class PrintableFormatter(logging.Formatter):
    """Format records without control characters. A lone surrogate would make the file handler drop the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return printable(super().format(record))


class CallbackHandler(logging.Handler):
    """Pass each formatted record to a function that prints it without breaking the live panel."""

    def __init__(self, show: Callable[[str, int], None]) -> None:
        super().__init__()
        self._show = show
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Show own records from INFO on and foreign ones from WARNING on."""
        own = record.name.partition(".")[0] == "roll_gspo"
        if record.name == PROGRESS_LOGGER or (not own and record.levelno < logging.WARNING):
            return
        try:
            text = self.format(record) if own else f"{record.name}: {self.format(record)}"
            self._show(text, record.levelno)
        except Exception:
            self.handleError(record)


@contextmanager
def run_logging(path: Path, show: Callable[[str, int], None]) -> Iterator[None]:
    """Write records to the file `path` (appended) and pass them to `show(text, level)`.

    Plain stream handlers of the root logger are removed meanwhile. They would print each record twice and break the
    live panel.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file, CallbackHandler(show)]
    root, own = logging.getLogger(), logging.getLogger("roll_gspo")
    aside = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    level = own.level
    root.handlers = [handler for handler in root.handlers if handler not in aside] + handlers
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        own.setLevel(level)
        root.handlers = [handler for handler in root.handlers if handler not in handlers] + aside
        file.close()
