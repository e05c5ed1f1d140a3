"""Datasets that are read with the `datasets` library: folders, output of `save_to_disk`, and the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from roll_gspo.data.files import EXTENSIONS, RawRow, file_extension
from roll_gspo.errors import DataError, MissingDependencyError

_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<config>[^@:]+))?(?::(?P<split>[^@:]*(?:\[[^\]]*\])?))?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SAVED_DATASET, _SAVED_DATASET_DICT = "state.json", "dataset_dict.json"


class DatasetName(NamedTuple):
    """Parts of a name such as `openai/gsm8k@main:train`."""

    name: str
    config: str | None
    split: str | None


def parse_dataset_name(text: str) -> DatasetName | None:
    """Return the parts of a folder or of a name on the hub, or None for the path of a file."""
    if Path(text).is_dir():
        return DatasetName(text, None, None)
    match = _NAME.fullmatch(text)
    if match is None or Path(text).exists() or file_extension(Path(text)) in EXTENSIONS:
        return None
    parts = DatasetName(match["name"], match["config"], match["split"] or None)
    return parts if Path(parts.name).is_dir() or _HUB_NAME.fullmatch(parts.name) else None


def read_dataset(parts: DatasetName, key: str) -> Iterator[RawRow]:
    """Yield the rows of one split.

    Args:
        parts: name, configuration and split.
        key: YAML key that names the dataset, for error messages.

    Raises:
        DataError: the name, configuration or split does not exist, or the hub cannot be reached.
        MissingDependencyError: the package `datasets` is not installed.
    """
    if Path(parts.name).is_dir():
        _check_folder(Path(parts.name), key)
    label = parts.name + (f"@{parts.config}" if parts.config else "")
    loaded = _load(parts, key)
    if isinstance(loaded, dict):  # DatasetDict is a dict
        split = parts.split or (next(iter(loaded)) if len(loaded) == 1 else None)
        if split not in loaded:
            problem = f"has no split '{split}'" if split else "has several splits"
            known = ", ".join(loaded)
            raise DataError(f"{key}: {label} {problem} (known: {known}); use {label}:SPLIT, or set split next to {key}")
        label, loaded = f"{label}:{split}", loaded[split]
    elif parts.split:
        label = f"{label}:{parts.split}"
    for index, row in enumerate(loaded):
        yield RawRow(f"{label}[{index}]", dict(row))


def _check_folder(folder: Path, key: str) -> None:
    readable = (*EXTENSIONS, ".arrow", ".csv", ".zip", ".gz")
    if not any(file.suffix.lower() in readable and file.is_file() for file in folder.rglob("*")):
        raise DataError(f"{key}: the folder {folder} has no data files; name a file or a folder with data files")


def _load(parts: DatasetName, key: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"{key}: {parts.name} needs the package 'datasets': pip install 'roll-gspo[data]', or use JSONL files",
            name="datasets",
        ) from error
    folder = Path(parts.name)
    try:
        if (folder / _SAVED_DATASET).is_file() or (folder / _SAVED_DATASET_DICT).is_file():
            if (folder / _SAVED_DATASET).is_file() and parts.split:
                raise DataError(f"{key}: {folder} is one saved split, but split is '{parts.split}'; remove it")
            return datasets.load_from_disk(parts.name)
        # The library resolves slices such as train[:100]. Plain splits are looked up in `read_dataset`, for a better
        # error message.
        sliced = parts.split if parts.split and "[" in parts.split else None
        return datasets.load_dataset(parts.name, parts.config, split=sliced)
    except DataError:
        raise
    except Exception as error:  # the library passes on arbitrary exceptions of the hub, file systems and parsers
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if folder.is_dir():
            fix = f"check its files with: python -m roll_gspo.data check {parts.name}/FILE"
            raise DataError(f"{key}: the folder {folder} cannot be read ({first_line}); {fix}") from error
        raise DataError(
            f"{key}: '{parts.name}' is neither a local file or folder nor available on the Hugging Face Hub "
            f"({first_line}); check name, configuration (NAME@CONFIG) and split (NAME:SPLIT), or download the dataset "
            "and name its folder"
        ) from error
