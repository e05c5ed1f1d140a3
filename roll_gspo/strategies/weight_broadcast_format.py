"""Layout of tensors in the byte buckets of a weight broadcast, and the manifest of each bucket."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from torch import Tensor

from roll_gspo.strategies.weight_update import FULL_MODEL

_ALIGNMENT = 64  # bytes; a multiple of every dtype size, so that tensors can be views of the bucket


@dataclass(frozen=True)
class TensorMeta:
    """Metadata of a tensor; `dtype` is the torch name without `torch.`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorMeta:
        """Return the metadata of `tensor`."""
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch object."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()


# Called with (manifest, is_last) of a bucket before any of its tensors is yielded; rejects it by raising.
Accept = Callable[[Sequence[TensorMeta], bool], None]


@dataclass(frozen=True)
class Header:
    """Announcement of the sender: a bucket, a request to open the group, or an error.

    Attributes:
        tensors: metadata of the tensors in order; a tensor larger than `bucket_bytes` has its own bucket.
        last: true for the last bucket of the source, which may be empty.
        checksum: true if a checksum follows each piece.
        bucket_bytes: maximum size of a piece.
        opens_group: no bucket follows; every member opens the process group now.
        error: no bucket follows; the reason that the transfer ended.
        kind: what the tensors are; see `weight_update`.
    """

    tensors: tuple[TensorMeta, ...] = ()
    last: bool = False
    checksum: bool = False
    bucket_bytes: int = 0
    opens_group: bool = False
    error: str = ""
    kind: str = FULL_MODEL

    def encode(self) -> str:
        """Encode as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Decode the output of `encode`."""
        fields = json.loads(data)
        metas = (TensorMeta(m["name"], m["dtype"], tuple(m["shape"])) for m in fields.pop("tensors"))
        return cls(tensors=tuple(metas), **fields)


class Buffers:
    """A pool of bucket buffers. A buffer is reused once no tensor refers to it: fresh pages cost more than a copy.

    The pool keeps two buffers, as an engine may hold tensors of an unfinished layer while the next bucket arrives.
    """

    _KEPT = 2

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, bucket_bytes: int) -> Tensor:
        """Return an uninitialised uint8 tensor [bucket_bytes]."""
        for buffer in self._kept:
            if len(buffer) == bucket_bytes and _num_references(buffer) == _num_references(torch.empty(1)):
                return buffer[:]
        buffer = torch.empty(bucket_bytes, dtype=torch.uint8)
        if len(self._kept) < self._KEPT:
            self._kept.append(buffer)
        return buffer[:]


def _num_references(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def pack_buckets(
    tensors: Iterable[tuple[str, Tensor]], buffer: Tensor, checksum: bool, kind: str = FULL_MODEL
) -> Iterator[tuple[Header, Tensor]]:
    """Yield a header and payload per bucket: the bytes of several tensors in `buffer`, or one larger tensor.

    A payload is valid until the next one is requested.
    """
    bucket_bytes = len(buffer)
    metas: list[TensorMeta] = []
    used = 0

    def header(packed: list[TensorMeta], last: bool = False) -> Header:
        return Header(tuple(packed), last, checksum, bucket_bytes, kind=kind)

    for name, tensor in tensors:
        tensor = tensor.detach()
        meta = TensorMeta.of(name, tensor)
        if metas and used + meta.nbytes > bucket_bytes:
            yield header(metas), buffer[:used]
            metas, used = [], 0
        if meta.nbytes > bucket_bytes:
            yield header([meta]), tensor
        else:
            end = used + meta.nbytes
            buffer[used:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            metas.append(meta)
            used = min(_aligned(end), bucket_bytes)
        del tensor  # free it before the source creates the next tensor
    yield header(metas, last=True), buffer[:used]


def allocate(header: Header, buffers: Buffers) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Allocate the payload that `header` announces; return it and (name, view) of each tensor in it."""
    metas = header.tensors
    if len(metas) == 1 and metas[0].nbytes > header.bucket_bytes:
        single = torch.empty(metas[0].shape, dtype=metas[0].torch_dtype)
        return single, [(metas[0].name, single)]
    offsets = list(accumulate((_aligned(meta.nbytes) for meta in metas), initial=0))
    payload = buffers.take(header.bucket_bytes)[: offsets[-1]]
    parts = zip(metas, offsets, strict=False)
    return payload, [(m.name, payload[o : o + m.nbytes].view(m.torch_dtype).view(m.shape)) for m, o in parts]


def pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Split `tensor` into views of at most `limit` bytes; the splits depend only on shape and dtype."""
    if tensor.nbytes <= limit:
        if tensor.numel():
            yield tensor
        return
    rows = limit * len(tensor) // tensor.nbytes
    for block in tensor.split(max(rows, 1)):
        yield from pieces(block if rows else block[0], limit)


def bytes_of(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as uint8."""
    return tensor.view(-1).view(torch.uint8)


def crc32(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a contiguous CPU tensor."""
    return zlib.crc32(bytes_of(tensor).numpy().data)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
