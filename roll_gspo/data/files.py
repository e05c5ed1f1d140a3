"""Readers of data files: JSONL and JSON, optionally gzipped, and parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from roll_gspo.errors import DataError, MissingDependencyError

MAX_LINE_BYTES = 64 << 20  # a longer line indicates a file without newlines
JSONL_EXTENSIONS, JSON_EXTENSIONS, PARQUET_EXTENSIONS = ("", ".jsonl", ".ndjson", ".txt"), (".json",), (".parquet",)
EXTENSIONS = (*JSONL_EXTENSIONS[1:], *JSON_EXTENSIONS, *PARQUET_EXTENSIONS)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class RawRow(NamedTuple):
    """One row of a file before validation.

    Attributes:
        place: `file:line`, or `file[index]` if the format has no lines.
        value: parsed value, or a `ValueError` if the row cannot be parsed.
    """

    place: str
    value: Any


def file_extension(path: Path) -> str:
    """Return the extension in lowercase without `.gz`: `.jsonl` for `rows.jsonl` and `rows.jsonl.gz`."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def read_file(path: Path, key: str) -> Iterator[RawRow]:
    """Yield the rows of a file. A row that cannot be parsed has the error as its value.

    Args:
        path: file to read.
        key: YAML key that names the file, for error messages.

    Raises:
        DataError: the file is missing, corrupt or of an unknown format.
        MissingDependencyError: the file is parquet and pyarrow is not installed.
    """
    extension = file_extension(path)
    if not path.is_file():
        raise DataError(f"{key}: {path} cannot be read (no such file); set {key} to a JSONL file")
    if extension not in (*JSONL_EXTENSIONS, *JSON_EXTENSIONS, *PARQUET_EXTENSIONS):
        raise DataError(
            f"{key}: {path} has the unknown extension '{extension}'; convert it to one of {', '.join(EXTENSIONS)}"
        )
    try:
        if extension in PARQUET_EXTENSIONS:
            yield from (RawRow(f"{path}[{i}]", row) for i, row in enumerate(_parquet_rows(path, key)))
        elif extension in JSON_EXTENSIONS:
            yield from _json_rows(path)
        else:
            yield from _jsonl_rows(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{key}: {path} cannot be read ({error}); replace the file") from error


def parse_json(text: str) -> Any:
    """Return the parsed value, or a `ValueError` instead of raising it. Duplicate keys and NaN are errors."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
    except RecursionError:
        return ValueError("it is nested too deeply")
    except ValueError as error:
        return error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{duplicate}' occurs twice; remove one of them")
    return values


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value; write null or remove the key")


def _open_file(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with _open_file(path) as file:
        number = 0
        # Only b"\n" ends a line. `str.splitlines` also splits at U+2028 and others, which JSON strings may contain.
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                _reject_utf_16(raw, path)
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            place = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                yield RawRow(
                    place,
                    ValueError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; does the file have newlines?"),
                )
            elif stripped := raw.strip():
                value = _decode(stripped)
                if isinstance(value, str):
                    value = parse_json(value)
                    if isinstance(value, ValueError) and not raw.endswith(b"\n"):
                        value = ValueError(f"{value}; the last line has no newline: is the file truncated?")
                yield RawRow(place, value)


def _json_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a JSON list. A `.json` file with one object per line is read as JSONL."""
    with _open_file(path) as file:
        content = file.read()
    _reject_utf_16(content, path)
    text = _decode(content.removeprefix(BYTE_ORDER_MARK))
    if isinstance(text, ValueError):
        raise DataError(f"{path}: {text}")
    if not text.strip():
        return
    value = parse_json(text)
    if isinstance(value, json.JSONDecodeError) and value.msg == "Extra data" and text.lstrip().startswith("{"):
        yield from _jsonl_rows(path)
    elif isinstance(value, ValueError):
        line = f":{value.lineno}" if isinstance(value, json.JSONDecodeError) else ""
        hint = "; is the file truncated?" if _is_truncated(value, text) else ""
        raise DataError(f"{path}{line}: not valid JSON ({value}){hint}")
    elif not isinstance(value, list):
        raise DataError(
            f"{path}: expected a JSON list of rows, got {abbreviate(value)}; use .jsonl for one object per line"
        )
    else:
        yield from (RawRow(f"{path}[{i}]", row) for i, row in enumerate(value))


def _is_truncated(error: ValueError, text: str) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def _reject_utf_16(start: bytes, path: Path) -> None:
    if start.startswith(UTF_16_MARKS):
        raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")


def _decode(raw: bytes) -> str | ValueError:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f" on line {raw.count(10, 0, error.start) + 1}" if b"\n" in raw else ""
        return ValueError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}{line}; save it as UTF-8"
        )


def _parquet_rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"{key}: reading {path} needs the package 'pyarrow': pip install pyarrow, or 'roll-gspo[data]'",
            name="pyarrow",
        ) from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{key}: {path} cannot be read as parquet ({error}); replace the file") from error


def abbreviate(value: Any) -> str:
    """Return the `repr` of a value, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
