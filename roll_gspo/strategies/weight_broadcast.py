"""Weight broadcast between processes: one sender and any number of receivers in a separate gloo group.

    sender = WeightBroadcastSender(WeightBroadcastAddress("127.0.0.1", port=0, world_size=2))  # trainer, rank 0
    receiver = WeightBroadcastReceiver(sender.address, rank=1)  # engine; waits for the store only
    sender.send(source, version=1)  # at the same time as ...
    with receiver.receive(version=1) as weights: load(weights)  # ... this, on every receiver

Tensors are sent as bytes in buckets. Before each bucket every receiver reports that it is ready, or its error. The
sender then posts the manifest of the bucket (names, shapes, dtypes), or its error, and broadcasts. So an error of one
side reaches the other as text, and no member blocks in a broadcast without a counterpart. These messages go through a
TCP store that the sender opens. The default process group is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore  # not exported by torch.distributed

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_broadcast_format import (
    Accept,
    Buffers,
    Header,
    allocate,
    bytes_of,
    crc32,
    pack_buckets,
    pieces,
)
from roll_gspo.strategies.weight_rendezvous import (
    TransferMember,
    TransferReceiver,
    TransferSender,
    as_transfer_error,
)
from roll_gspo.strategies.weight_update import FULL_MODEL, check_kind

BUCKET_BYTES = 16 << 20  # measured: larger buckets do not stay in the CPU cache between copy and broadcast
_LISTED = 8


class _GlooMember(TransferMember):
    """The gloo group of a member, which opens with the first transfer."""

    _group: dist.ProcessGroupGloo | None = None

    def _open_group(self) -> None:
        """Open the process group. All members call this together; each uses the interface that reaches the sender."""
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timedelta(seconds=self.address.timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address.own_ip())]
        store = PrefixStore("group", self._store)
        with self._unusable_after_error("open the group"):
            self._group = dist.ProcessGroupGloo(store, self._rank, self.address.world_size, options)

    def _broadcast(self, tensor: Tensor) -> None:
        """Broadcast the bytes of a contiguous CPU tensor from rank 0."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        with self._unusable_after_error("broadcast"):
            self._group.broadcast([bytes_of(tensor)], options).wait()  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        self._group = None
        super().close()


class WeightBroadcastSender(_GlooMember, TransferSender):
    """Rank 0 of a weight broadcast. It does not wait for receivers, which connect before or during the first `send`.

    A lost receiver cannot be replaced: open a new sender and connect all receivers to it.

    Args:
        address: its `host` is this machine's address as seen by the receivers.
        bucket_bytes: maximum size of a message, and the memory that a transfer needs besides its source.

    Raises:
        WeightTransferError: the port is in use.
    """

    def __init__(self, address: WeightBroadcastAddress, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(address, range(1, address.world_size))
        self._bucket_bytes = bucket_bytes
        self._buffers = Buffers()

    def send(
        self,
        source: Iterable[tuple[str, Tensor]],
        version: int,
        checksum: bool = False,
        kind: str = FULL_MODEL,
    ) -> None:
        """Send (name, tensor) pairs; return when every receiver has received all of them.

        The source is iterated once and to its end, even if a receiver fails: other ranks may take part in a
        collective export. Tensors may be on any device and have any strides.

        Args:
            source: pairs to send, e.g. a `WeightSource`.
            version: version that every receiver must be waiting for.
            checksum: send a CRC-32 with every piece, at about the cost of a copy.
            kind: what the tensors are, e.g. `FULL_MODEL`; receivers refuse a kind that they do not take.

        Raises:
            WeightTransferError: the source failed, or a receiver failed, is late or waits for another version. The
                message has the rank, its name and its error.
        """
        self._begin()
        tensors = self.exporting(source, version)
        try:
            self._check_usable()
            if self._group is None:
                self._post_header(Header(opens_group=True, kind=kind), version)
                self._open_group()
            for header, payload in pack_buckets(tensors, self._buffers.take(self._bucket_bytes), checksum, kind):
                self._post_header(header, version)
                self._send_payload(payload, checksum)
                del payload  # free it before the source creates the next tensor
            self._await_receivers(version)
        except BaseException as error:
            wrapped = as_transfer_error(error, version)
            text = str(wrapped) or type(error).__name__
            self._post_error(Header(error=text).encode(), text)
            if isinstance(error, WeightTransferError):
                with suppress(Exception):
                    for _ in tensors:
                        pass
            if wrapped is error:
                raise
            raise wrapped from error

    def _send_payload(self, payload: Tensor, checksum: bool) -> None:
        for piece in pieces(payload, self._bucket_bytes):
            sent = piece.contiguous().cpu()
            self._broadcast(sent)
            if checksum:
                self._broadcast(torch.tensor([crc32(sent)]))

    def _post_header(self, header: Header, version: int) -> None:
        """Post the next header once all receivers wait for it."""
        self._await_receivers(version)
        self._post(header.encode())


class WeightBroadcastReceiver(_GlooMember, TransferReceiver):
    """A receiver of a weight broadcast (rank 1 or above). It waits for the sender's store, not for other receivers.

    Args:
        address: `WeightBroadcastSender.address`.
        rank: rank of this receiver; default `address.first_rank`.
        name: name in errors, besides process ID and host.
        kind: the only kind of update that this receiver takes.

    Raises:
        WeightTransferError: the sender's store cannot be reached.
    """

    def __init__(
        self, address: WeightBroadcastAddress, rank: int | None = None, name: str = "", kind: str = FULL_MODEL
    ) -> None:
        rank = address.first_rank if rank is None else rank
        super().__init__(address, rank, address.world_size - 1, name)
        self._kind = kind
        self._buffers = Buffers()

    @contextmanager
    def receive(self, version: int, accept: Accept | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Receive a version: iterate the (name, tensor) pairs to the end within the `with` block.

        Tensors are on the CPU. The caller may keep them, but a small tensor keeps its whole bucket alive. Besides,
        only one bucket, or one larger tensor, is held at a time.

        Args:
            version: version that the sender must send next.
            accept: rejects a bucket by raising, before any of its tensors is yielded.

        Raises:
            WeightTransferError: the sender failed or is late, a checksum differs, the update is of another kind, or the
                iteration ended early. An exception raised in the block propagates unchanged. The sender raises the
                same text.
        """
        self._begin()
        ended: list[bool] = []
        try:
            self._check_usable()
            yield self._tensors(version, accept, ended)
            if not ended:
                raise WeightTransferError(f"weight transfer of version {version}: the receiver stopped before its end")
            self._report(version)
        except BaseException as error:
            self._report_error(version, error)
            raise

    def _tensors(self, version: int, accept: Accept | None, ended: list[bool]) -> Iterator[tuple[str, Tensor]]:
        while True:
            self._report(version)
            header = self._next_header(version)
            if header.opens_group:
                self._open_group()
                continue
            received = self._take(header)
            check_kind(header.kind, self._kind)  # after the bucket, as the sender would wait in the broadcast
            if accept is not None:
                accept(header.tensors, header.last)
            yield from received
            del received  # free it before the next bucket is allocated
            if header.last:
                break
        ended.append(True)

    def _next_header(self, version: int) -> Header:
        header = Header.decode(self._next_message(version))
        if header.error:
            raise WeightTransferError(header.error)
        self._step += 1
        return header

    def _take(self, header: Header) -> list[tuple[str, Tensor]]:
        """Receive one bucket; checksums are verified after all pieces have arrived."""
        payload, tensors = allocate(header, self._buffers)
        damaged = False
        for piece in pieces(payload, header.bucket_bytes):
            self._broadcast(piece)
            if header.checksum:
                sent = torch.empty(1, dtype=torch.int64)
                self._broadcast(sent)
                damaged |= int(sent) != crc32(piece)
        if damaged:
            names = [meta.name for meta in header.tensors]
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise WeightTransferError(
                f"weight transfer: rank {self._rank} received corrupted bytes (checksums differ) for "
                f"{', '.join(names[:_LISTED])}{more}"
            )
        return tensors
