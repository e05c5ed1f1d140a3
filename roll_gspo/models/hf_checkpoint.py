"""Weights of a checkpoint folder in Hugging Face layout, read and written one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from roll_gspo.errors import CheckpointError
from roll_gspo.models.weight_mapping import fused_slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 * 1024**3
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class CheckpointReader:
    """Random access to the tensors of one folder, whole or sharded, without loading it all.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        CheckpointError: there are no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                names = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; convert the weights to safetensors")
        self._file_of = names
        self._open: dict[str, safe_open] = {}
        self.unread = set(names)

    def read(self, name: str) -> Tensor:
        """The tensor of a checkpoint name; a per-expert name is also found inside a fused tensor.

        Raises:
            CheckpointError: the folder has no such tensor.
        """
        if name in self._file_of:
            self.unread.discard(name)
            return self._file(name).get_tensor(name)
        place = fused_slice(name)
        if place is not None and place.name in self._file_of:
            self.unread.discard(place.name)
            return place.cut(self._file(place.name).get_slice(place.name)[place.expert])
        raise CheckpointError(f"{self.folder}: no tensor '{name}'; config.json and the weights do not agree")

    def _file(self, name: str) -> safe_open:
        file_name = self._file_of[name]
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.folder / file_name, "pt")
        return self._open[file_name]


def write_checkpoint(
    folder: Path,
    source: Path,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, `config.json` and tokenizer files into an existing folder.

    Args:
        folder: where to.
        source: the folder whose config and tokenizer are copied.
        weights: checkpoint names and tensors, streamed; at most one shard is held in memory.
        dtype: that the tensors are written in; `config.json` is made to say so.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """
    shards: list[dict[str, Tensor]] = [{}]
    written: list[tuple[Path, list[str]]] = []
    size = total = 0
    for name, tensor in weights:
        # a copy of its own: safetensors refuses tensors that share memory
        tensor = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            written.append(_write_shard(folder, len(written), shards.pop()))
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    written.append(_write_shard(folder, len(written), shards.pop()))
    _name_shards(folder, written, total)
    for path in source.iterdir():
        if path.suffix in _COMPANIONS and path.name != INDEX and path.is_file():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f"shard-{number:05d}.part"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, list(tensors)


def _name_shards(folder: Path, written: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    """Give the shards their final names, which say how many there are, and write the index."""
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
