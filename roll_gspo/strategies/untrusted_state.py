"""Safe reading of a state from an unknown source: nothing in its files can run code.

`torch.distributed.checkpoint` and megatron-core unpickle `.metadata`, and items other than tensors in a `.distcp` file,
without restriction. This module checks both before they are read. torch restricts the rest: tensors and `common.pt`
load with `weights_only`.
"""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.utils import _ReaderView
from torch.serialization import _get_layout

from roll_gspo.strategies.restricted_load import load_restricted, unreadable

INDEX, COMMON = ".metadata", "common.pt"
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # its name since Python 3.13
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", kind.__name__): kind
        for kind in (
            *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata),
            *(metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING),
        )
    },
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickle an index of tensors.

    `BytesStorageMetadata` is not allowed either, because torch unpickles such items without restriction.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no index of tensors does")
        return _ALLOWED[module, name]


def read_index(folder: Path) -> metadata.Metadata:
    """Read where each piece of each tensor lies.

    Raises:
        CheckpointError: the file is damaged, or refers to code or to anything but tensors.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, metadata.Metadata):
            raise pickle.UnpicklingError(f"it holds an object of type {type(index).__name__}")
        if not all(isinstance(item, metadata.TensorStorageMetadata) for item in index.state_dict_metadata.values()):
            raise pickle.UnpicklingError("it names something that is no tensor")
        if not all(isinstance(place, filesystem._StorageInfo) for place in index.storage_data.values()):
            raise pickle.UnpicklingError("it has a place that is none")
    except Exception as error:  # a crafted pickle can raise any type
        raise unreadable(path, error) from error
    return index


def check_contents(folder: Path, files: Collection[str]) -> None:
    """Check that reading the state will run no code and open no file but its own.

    Args:
        folder: the state, whose sizes and checksums are checked already.
        files: names in its manifest.

    Raises:
        CheckpointError: names the file.
    """
    for place in read_index(folder).storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or name not in files or "/" in name or place.transform_descriptors:
            raise unreadable(folder / INDEX, ValueError(f"it refers to {name!r}, which is no file of this state"))
    load_restricted(folder / COMMON)


def check_tensor_files(folder: Path) -> None:
    """Read every tensor; used after a load has failed, to name the file.

    Raises:
        CheckpointError: names the first file that cannot be read.
    """
    for place in read_index(folder).storage_data.values():
        path = folder / place.relative_path
        with path.open("rb") as file:
            load_restricted(path, _ReaderView(file, place.offset, place.length))  # type: ignore[arg-type]
