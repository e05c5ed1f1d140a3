"""Names for the `datasets` library: folders, what `save_to_disk` wrote, and the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from roll_gspo.data.files import ENDINGS, Item, ending_of
from roll_gspo.errors import DataError, MissingDependencyError

_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<config>[^@:]+))?(?::(?P<split>[^@:]*(?:\[[^\]]*\])?))?")
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


class DatasetName(NamedTuple):
    """`openai/gsm8k@main:train` in its parts."""

    name: str
    config: str | None
    split: str | None


def dataset_name(text: str) -> DatasetName | None:
    """The parts of a folder or a name on the hub; None where it is neither, i.e. the path of a file."""
    if Path(text).is_dir():
        return DatasetName(text, None, None)
    match = _NAME.fullmatch(text)
    if match is None or Path(text).exists() or ending_of(Path(text)) in ENDINGS:
        return None
    parts = DatasetName(match["name"], match["config"], match["split"] or None)
    return parts if Path(parts.name).is_dir() or _ON_THE_HUB.fullmatch(parts.name) else None


def read_dataset(parts: DatasetName, where: str) -> Iterator[Item]:
    """Every row of one split.

    Raises:
        DataError: there is nothing of this name, configuration or split, or the hub cannot be reached.
        MissingDependencyError: the package `datasets` is not installed.
    """
    if Path(parts.name).is_dir():
        _check_folder(Path(parts.name), where)
    label = parts.name + (f"@{parts.config}" if parts.config else "")
    loaded = _loaded(parts, where)
    if isinstance(loaded, dict):  # DatasetDict is one
        split = parts.split or (next(iter(loaded)) if len(loaded) == 1 else None)
        if split not in loaded:
            wrong = f"has no split '{split}'" if split else "has several splits and none is chosen"
            has = ", ".join(loaded)
            raise DataError(
                f"{where}: {label} {wrong} (it has {has}); write {label}:SPLIT, or set split beside {where}"
            )
        label, loaded = f"{label}:{split}", loaded[split]
    elif parts.split:
        label = f"{label}:{parts.split}"
    for index, row in enumerate(loaded):
        yield Item(f"{label}[{index}]", dict(row))


def _check_folder(folder: Path, where: str) -> None:
    readable = (*ENDINGS, ".arrow", ".csv", ".zip", ".gz")
    if not any(file.suffix.lower() in readable and file.is_file() for file in folder.rglob("*")):
        raise DataError(f"{where}: {folder} is a folder without data files; name a file, or the folder of the files")


def _loaded(parts: DatasetName, where: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"{where}: {parts.name} needs the package 'datasets': pip install 'roll-gspo[data]'; or name JSONL files",
            name="datasets",
        ) from error
    folder = Path(parts.name)
    try:
        if (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file():
            if (folder / _SAVED).is_file() and parts.split:
                raise DataError(f"{where}: {folder} is one saved split, but split is '{parts.split}'; remove it")
            return datasets.load_from_disk(parts.name)
        # A slice such as train[:100] is cut by the library, a plain name is looked up here for a better error.
        sliced = parts.split if parts.split and "[" in parts.split else None
        return datasets.load_dataset(parts.name, parts.config, split=sliced)
    except DataError:
        raise
    except Exception as error:  # the library lets through whatever hub, file systems and parsers raise
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if folder.is_dir():
            way_out = f"see what is wrong with its files: python -m roll_gspo.data check {parts.name}/FILE"
            raise DataError(f"{where}: the folder {folder} cannot be read ({first_line}); {way_out}") from error
        raise DataError(
            f"{where}: '{parts.name}' is neither a file or folder here nor to be had from the Hugging Face hub "
            f"({first_line}); check name, configuration (NAME@CONFIG) and split (NAME:SPLIT), or download it and give "
            "the folder"
        ) from error
