"""Read and write the weights of a checkpoint in Hugging Face layout, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from roll_gspo.errors import CheckpointError
from roll_gspo.models.config_files import CONFIG, read_object
from roll_gspo.models.folder_check import CHAT_TEMPLATES
from roll_gspo.models.weight_mapping import FusedSlice, fused_slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 * 1024**3
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("adapter_config.json", CONFIG, "*.index.json", "*.index.*.json")  # describe the source's weights


class CheckpointReader:
    """Random access to the tensors of a checkpoint folder, sharded or not, without loading the whole model.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        CheckpointError: from every method, if there are no safetensors or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, safe_open] = {}
        if (folder / SINGLE).is_file():  # as in transformers, an index beside it is not read
            names = dict.fromkeys(self._opened(SINGLE).keys(), SINGLE)
        elif (folder / INDEX).is_file():
            names = read_object(folder / INDEX)["weight_map"]
        else:
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; convert the weights to safetensors")
        self._file_of = names

    @property
    def names(self) -> set[str]:
        """Names of the stored tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; reads only the header.

        Raises:
            CheckpointError: the folder has no such tensor.
        """
        stored, place = self._find(name)
        shape = tuple(self._opened(self._file_of[stored]).get_slice(stored).get_shape())
        if place is None:
            return shape
        if place.expert >= shape[0]:
            raise CheckpointError(
                f"{self.folder}: no tensor '{name}', '{stored}' holds {shape[0]} experts; "
                "config.json and the weights do not agree"
            )
        return shape[1:] if place.half is None else (shape[1] // 2, *shape[2:])

    def read(self, name: str, axis: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read a tensor, or its slice `start:stop` along `axis` (0 or 1).

        A per-expert name is also looked up inside a fused tensor.

        Raises:
            CheckpointError: the folder has no such tensor.
        """
        stored, place = self._find(name)
        piece = (slice(None),) * axis + (slice(start, stop),)
        tensor = self._opened(self._file_of[stored]).get_slice(stored)
        return tensor[piece] if place is None else place.select(tensor[place.expert])[piece]

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = (), prefix: str = "") -> None:
        """Check that the checkpoint holds exactly the tensors of a model; reads only headers.

        Args:
            shapes: checkpoint names and shapes of the model.
            ignored: name suffixes of further tensors to accept.
            prefix: start of the names of the model; all others are accepted.

        Raises:
            CheckpointError: a tensor is missing, has a different shape, or is not part of the model.
        """
        for name, want in shapes.items():
            if (found := self.shape(name)) != want:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {found}, but config.json needs {want}; use matching files"
                )
        ends = tuple(ignored)
        unused = self.names - {self._find(name)[0] for name in shapes}
        if unused := {name for name in unused if name.startswith(prefix) and not name.endswith(ends)}:
            raise CheckpointError(
                f"{self.folder}: {len(unused)} tensors are not part of the model, e.g. '{min(unused)}'; "
                "the model would not compute what this checkpoint defines"
            )

    def _find(self, name: str) -> tuple[str, FusedSlice | None]:
        """Return the stored tensor that is, or contains, the named tensor."""
        if name in self._file_of:
            return name, None
        place = fused_slice(name)
        if place is not None and place.name in self._file_of:
            return place.name, place
        raise CheckpointError(f"{self.folder}: no tensor '{name}'; config.json and the weights do not agree")

    def _opened(self, file_name: str) -> safe_open:
        if file_name not in self._open:
            try:
                self._open[file_name] = safe_open(self.folder / file_name, "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.folder / file_name}: cannot be read ({error}); the file is damaged; download it again"
                ) from error
        return self._open[file_name]


class Fingerprint(NamedTuple):
    """Shape, dtype and CRC-32 of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: int

    @staticmethod
    def of(tensor: Tensor) -> Fingerprint:
        """Compute the fingerprint of a CPU tensor."""
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return Fingerprint(tuple(tensor.shape), tensor.dtype, zlib.crc32(content))


def write_checkpoint(
    folder: Path,
    source: Path,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, tokenizer files and finally `config.json` into an existing folder; read the weights back.

    Args:
        folder: output folder; after a failure the files written so far are deleted.
        source: folder whose config and tokenizer are copied.
        weights: checkpoint names and tensors, streamed; at most one shard is held in memory.
        dtype: dtype of the written tensors; also set in `config.json`.
        max_shard_bytes: maximum size of a shard.

    Raises:
        CheckpointError: the files cannot be written, or read back differently.
    """
    existing = set(folder.iterdir())
    try:
        verify_weights(folder, _write_weights(folder, weights, dtype, max_shard_bytes))
        _write_companions(folder, source, dtype)
    except BaseException as error:
        for path in set(folder.iterdir()) - existing:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(
                f"{folder}: the model cannot be written ({error}); free space or choose another folder"
            ) from error
        raise


def verify_weights(folder: Path, written: Mapping[str, Fingerprint]) -> None:
    """Read every tensor of a checkpoint, one at a time, and compare it with the fingerprint of the source.

    Raises:
        CheckpointError: names, shapes, dtypes or values differ.
    """
    reader = CheckpointReader(folder)
    wrong = reader.names ^ written.keys()
    if not wrong:
        wrong = {name for name, fingerprint in written.items() if Fingerprint.of(reader.read(name)) != fingerprint}
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors on disk differ from those written, e.g. '{min(wrong)}'; "
            "check the disk, or choose another folder"
        )


def _write_weights(
    folder: Path, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, Fingerprint]:
    """Write the shards and their index; return the fingerprint of each tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    written: list[tuple[Path, list[str]]] = []
    fingerprints: dict[str, Fingerprint] = {}
    size = total = 0
    for name, tensor in weights:
        # copy: safetensors refuses tensors that share memory, and the source may reuse the buffer
        tensor = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            written.append(_write_shard(folder, len(written), shards.pop()))
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        fingerprints[name] = Fingerprint.of(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    written.append(_write_shard(folder, len(written), shards.pop()))
    _name_shards(folder, written, total)
    return fingerprints


def _write_companions(folder: Path, source: Path, dtype: torch.dtype) -> None:
    """Copy tokenizer, chat templates and settings, but no file that describes the weights of the source."""
    for path in source.iterdir():
        is_of_weights = any(fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED)
        if path.is_file() and path.suffix in _COMPANIONS and not is_of_weights:
            shutil.copyfile(path, folder / path.name)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, folder / CHAT_TEMPLATES)
    config = read_object(source / CONFIG)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f"shard-{number:05d}.part"
    save_file(tensors, path, metadata={"format": "pt"})
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a full disk may be reported only here
    finally:
        os.close(descriptor)
    return path, list(tensors)


def _name_shards(folder: Path, written: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    """Rename the shards to their final names, which contain the number of shards, and write the index."""
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(written, start=1):
        final = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
