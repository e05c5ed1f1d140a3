"""How tensors lie in the byte buckets of a wire, and the manifest that goes before each."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; more than any dtype needs, so that every tensor can be read where it lies in its bucket


@dataclass(frozen=True)
class TensorMeta:
    """A tensor of a manifest; `dtype` is torch's name without `torch.`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorMeta:
        """Describe `tensor`."""
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()


# Called with a bucket's manifest, and whether it is the last one, before any of its tensors is handed out.
Accept = Callable[[Sequence[TensorMeta], bool], None]


@dataclass(frozen=True)
class Header:
    """What the sender says before it broadcasts: a bucket, the call to open the group, or its error.

    Attributes:
        tensors: of the bucket, in order; a tensor larger than `bucket_bytes` is alone.
        last: the source ends with this bucket, which may be empty.
        checksum: one follows each piece.
        bucket_bytes: largest piece.
        opens_group: no bucket; every member opens the group now.
        error: no bucket; why the transfer ends here.
    """

    tensors: tuple[TensorMeta, ...] = ()
    last: bool = False
    checksum: bool = False
    bucket_bytes: int = 0
    opens_group: bool = False
    error: str = ""

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """What `encode` wrote."""
        fields = json.loads(data)
        metas = (TensorMeta(m["name"], m["dtype"], tuple(m["shape"])) for m in fields.pop("tensors"))
        return cls(tensors=tuple(metas), **fields)


class Buffers:
    """Memory for buckets that is used again as soon as nobody holds a tensor in it: fresh pages cost more than a copy.

    Two are kept: while the next bucket arrives an engine may hold the tensors of an unfinished layer.
    """

    _KEPT = 2

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, bucket_bytes: int) -> Tensor:
        """Uninitialised uint8 [bucket_bytes]."""
        for buffer in self._kept:
            if len(buffer) == bucket_bytes and _holders(buffer) == _holders(torch.empty(1)):
                return buffer[:]
        buffer = torch.empty(bucket_bytes, dtype=torch.uint8)
        if len(self._kept) < self._KEPT:
            self._kept.append(buffer)
        return buffer[:]


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def pack(tensors: Iterable[tuple[str, Tensor]], buffer: Tensor, checksum: bool) -> Iterator[tuple[Header, Tensor]]:
    """Headers with their payloads: bytes of several tensors in `buffer`, or a single tensor larger than that.

    A payload is valid until the next one is asked for.
    """
    bucket_bytes = len(buffer)
    metas: list[TensorMeta] = []
    used = 0

    def header(packed: list[TensorMeta], last: bool = False) -> Header:
        return Header(tuple(packed), last, checksum, bucket_bytes)

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
        del tensor  # a source may make its next tensor only when this one is gone
    yield header(metas, last=True), buffer[:used]


def room(header: Header, buffers: Buffers) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """An empty payload for what `header` announces, and the tensors that lie in it."""
    metas = header.tensors
    if len(metas) == 1 and metas[0].nbytes > header.bucket_bytes:
        single = torch.empty(metas[0].shape, dtype=metas[0].torch_dtype)
        return single, [(metas[0].name, single)]
    offsets = list(accumulate((_aligned(meta.nbytes) for meta in metas), initial=0))
    payload = buffers.take(header.bucket_bytes)[: offsets[-1]]
    parts = zip(metas, offsets, strict=False)
    return payload, [(m.name, payload[o : o + m.nbytes].view(m.torch_dtype).view(m.shape)) for m, o in parts]


def pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Views that make up `tensor`, of at most `limit` bytes each; where it is cut depends on shape and dtype only."""
    if tensor.nbytes <= limit:
        if tensor.numel():
            yield tensor
        return
    rows = limit * len(tensor) // tensor.nbytes
    for block in tensor.split(max(rows, 1)):
        yield from pieces(block if rows else block[0], limit)


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8."""
    return tensor.view(-1).view(torch.uint8)


def crc32(tensor: Tensor) -> int:
    """Of a contiguous CPU tensor's bytes."""
    return zlib.crc32(bytes_of(tensor).numpy().data)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
