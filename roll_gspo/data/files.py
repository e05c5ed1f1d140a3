"""Files of rows to parsed values with their places: JSONL, JSON, parquet; gzip of the first two."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from roll_gspo.errors import DataError, MissingDependencyError

MAX_LINE_BYTES = 64 << 20  # what is longer is a file without line ends, not a row
LINES, LIST, PARQUET = ("", ".jsonl", ".ndjson", ".txt"), (".json",), (".parquet",)
ENDINGS = (*LINES[1:], *LIST, *PARQUET)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Item(NamedTuple):
    """One row as it lies in a file.

    Attributes:
        place: `file:line`, or `file[index]` where a file has no lines.
        value: what was parsed, or the error that parsing gave.
    """

    place: str
    value: Any


def ending_of(path: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def read_file(path: Path, where: str) -> Iterator[Item]:
    """Every row of a file; what is wrong with a single row is in its item.

    Raises:
        DataError: the file is missing, of another format, or damaged as a whole.
        MissingDependencyError: a parquet file, and pyarrow is not installed.
    """
    ending = ending_of(path)
    if not path.is_file():
        raise DataError(f"{where}: {path} cannot be read (no such file); set {where} to a JSONL file")
    if ending not in (*LINES, *LIST, *PARQUET):
        raise DataError(
            f"{where}: {path}: files that end in '{ending}' are not read; convert it to one of {', '.join(ENDINGS)}"
        )
    try:
        if ending in PARQUET:
            yield from (Item(f"{path}[{i}]", row) for i, row in enumerate(_parquet_rows(path, where)))
        elif ending in LIST:
            yield from _list_items(path)
        else:
            yield from _line_items(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: {path} cannot be read ({error}); write the file anew, or name another") from error


def parse_json(text: str) -> Any:
    """The value, or the ValueError that says what is wrong; keys that repeat and NaN are wrong too."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        return ValueError("it is nested too deeply")
    except ValueError as error:
        return error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' is there twice; leave one of them")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value; write null or leave the key out")


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _line_items(path: Path) -> Iterator[Item]:
    with _open(path) as file:
        number = 0
        # Lines end at b"\n" alone: JSON strings may hold U+2028 and others that `str.splitlines` takes for line ends.
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                _refuse_utf_16(raw, path)
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            place = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                yield Item(
                    place, ValueError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; has it no line ends?")
                )
            elif stripped := raw.strip():
                value = _decoded(stripped)
                if isinstance(value, str):
                    value = parse_json(value)
                    if isinstance(value, ValueError) and not raw.endswith(b"\n"):
                        value = ValueError(f"{value}; it is the last line and has no end: was the file cut off?")
                yield Item(place, value)


def _list_items(path: Path) -> Iterator[Item]:
    """Rows of a JSON list; a `.json` file that has one object a line is taken as JSONL."""
    with _open(path) as file:
        content = file.read()
    _refuse_utf_16(content, path)
    text = _decoded(content.removeprefix(BYTE_ORDER_MARK))
    if isinstance(text, ValueError):
        raise DataError(f"{path}: {text}")
    if not text.strip():
        return
    value = parse_json(text)
    if isinstance(value, json.JSONDecodeError) and value.msg == "Extra data" and text.lstrip().startswith("{"):
        yield from _line_items(path)
    elif isinstance(value, ValueError):
        line = f":{value.lineno}" if isinstance(value, json.JSONDecodeError) else ""
        cut = "; the file ends in the middle: was it cut off?" if _is_cut(value, text) else ""
        raise DataError(f"{path}{line}: not valid JSON ({value}){cut}")
    elif not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of rows ({shown(value)}); one object a line goes in .jsonl")
    else:
        yield from (Item(f"{path}[{i}]", row) for i, row in enumerate(value))


def _is_cut(error: ValueError, text: str) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def _refuse_utf_16(start: bytes, path: Path) -> None:
    if start.startswith(UTF_16_MARKS):
        raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")


def _decoded(raw: bytes) -> str | ValueError:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f" on line {raw.count(10, 0, error.start) + 1}" if b"\n" in raw else ""
        return ValueError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}{line}; save it as UTF-8"
        )


def _parquet_rows(path: Path, where: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"{where}: reading {path} needs the package 'pyarrow': pip install pyarrow, or 'roll-gspo[data]'",
            name="pyarrow",
        ) from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{where}: {path} cannot be read as parquet ({error}); write the file anew") from error


def shown(value: Any) -> str:
    """A value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
