"""Parts of tensors that a rank writes and reads in the format of `torch.distributed.checkpoint`.

torch's own planners take tensors on the device. These take any tensor, e.g. a staged copy in host memory, with its
position in the whole tensor. The reader needs no communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.sharded_state import cause
from roll_gspo.strategies.untrusted_state import INDEX, check_tensor_files, read_index


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Attributes:
        key: name of the tensor in the state.
        data: values of the part, or memory to read them into.
        offset: position of the part in the tensor.
        whole: shape of the tensor.
    """

    key: str
    data: Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def index(self) -> MetadataIndex:
        """Name and position."""
        return MetadataIndex(self.key, self.offset)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Position and size."""
        return ChunkStorageMetadata(torch.Size(self.offset), self.data.shape)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, without gradient: the shard of a `DTensor`, all of any other tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def box_of(key: str, tensor: Tensor, data: Tensor | None = None) -> Box:
    """Return this rank's part of a tensor under a name, with its values or with `data` of the same shape."""
    offset = (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()
        offset = tuple(chunk.offsets)
    return Box(key, local_part(tensor) if data is None else data, offset, tuple(tensor.shape))


class BoxSavePlanner(DefaultSavePlanner):
    """Plans a write of boxes. A box of several ranks is written by one of them."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        super().__init__(flatten_state_dict=False)
        self._boxes = {box.index: box for box in boxes if box.data.numel()}

    def create_local_plan(self) -> SavePlan:
        """Return a write per box."""
        self.plan = SavePlan([_write_item(box) for box in self._boxes.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of a box."""
        return self._boxes[write_item.index].data


def _write_item(box: Box) -> WriteItem:
    properties = TensorProperties.create_from_tensor(box.data)
    data = TensorWriteData(box.chunk, properties, torch.Size(box.whole))
    return WriteItem(box.index, WriteItemType.SHARD, tensor_data=data)


class _BoxLoadPlanner(DefaultLoadPlanner):
    """Finds the memory of the boxes to read."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        super().__init__()
        self._boxes = {box.index: box for box in boxes}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index].data


def read_boxes(folder: Path, boxes: Sequence[Box]) -> None:
    """Fill the data of boxes from a state that was split in any way, one stored piece at a time.

    Args:
        folder: a state that `open_state` has checked.
        boxes: parts of any dtype and on any device.

    Raises:
        CheckpointError: the state does not hold a box, or a file is damaged.
    """
    index = read_index(folder)
    items: list[ReadItem] = []
    for box in boxes:
        stored = index.state_dict_metadata.get(box.key)
        if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != box.whole:
            raise _incomplete(folder, box.key)
        found = create_read_items_for_chunk_list(box.key, stored, [box.chunk]) if box.data.numel() else []
        if sum(math.prod(item.lengths) for item in found) != box.data.numel():
            raise _incomplete(folder, box.key)
        items += found
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(index, is_coordinator=False)
    try:
        reader.read_data(LoadPlan(items), _BoxLoadPlanner(boxes)).wait()
    except Exception as error:  # crafted files can raise any type
        check_tensor_files(folder)
        raise CheckpointError(f"{folder}: cannot be read ({cause(error)}); choose another checkpoint") from error


def _incomplete(folder: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / INDEX}: cannot be read (it does not hold all of '{key}'); choose another checkpoint"
    )
