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

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # not exported by torch.distributed

from roll_gspo.errors import WeightTransferError
from roll_gspo.rendezvous import StoreAddress, connect_store, open_store
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

BUCKET_BYTES = 16 << 20  # measured: larger buckets do not stay in the CPU cache between copy and broadcast
_GRACE_S = 5.0  # receivers wait longer than the sender, which can name the late rank
_LISTED = 8
_LOST = "lost"  # key of the message of `report_loss`
_POLL_S = 1.0  # interval at which a waiting sender checks for it


class _Member:
    """Common part of sender and receiver: store, process group, and counters of transfers and their buckets."""

    def __init__(self, address: WeightBroadcastAddress, rank: int, is_sender: bool) -> None:
        self.address = address
        self._rank = rank
        self._group: dist.ProcessGroupGloo | None = None
        self._transfer = self._step = 0
        self._broken = ""
        self._buffers = Buffers()
        try:
            self._opened: Store | None
            if is_sender:
                self._opened, where = open_store(address.host, address.timeout_s, address.port)
                self.address = replace(address, port=where.port, secret=where.secret)
            else:
                self._opened = connect_store(_store_address(address), address.timeout_s)
        except (RuntimeError, ValueError, OSError) as error:
            doing = "open the store at" if is_sender else "reach the sender's store at"
            raise WeightTransferError(
                f"weight transfer: rank {rank} could not {doing} {address.host}:{address.port} within "
                f"{address.timeout_s:g} s: {error}"
            ) from error

    @property
    def _store(self) -> Store:
        if self._opened is None:
            raise WeightTransferError("weight transfer: the connection is closed; connect again")
        return self._opened

    def _key(self, kind: str, rank: int = 0) -> str:
        return f"{self._transfer}/{self._step}/{kind}/{rank}"

    def _wait(self, key: str, timeout_s: float) -> bool:
        """Wait for `key`; return False on timeout."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return False
        return True

    def _begin(self) -> None:
        self._transfer += 1
        self._step = 0

    def _check_usable(self) -> None:
        if self._broken:
            raise WeightTransferError(f"weight transfer: an earlier transfer failed ({self._broken}); connect again")

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

    @contextmanager
    def _unusable_after_error(self, doing: str) -> Iterator[None]:
        """Mark the connection as unusable after an error, as the members are no longer in step."""
        try:
            yield
        except BaseException as error:
            self._broken = f"{type(error).__name__} in {doing}"
            if not isinstance(error, RuntimeError):
                raise
            raise WeightTransferError(
                f"weight transfer: rank {self._rank} could not {doing} with the {self.address.world_size} members "
                f"of the broadcast: {error}"
            ) from error

    def close(self) -> None:
        """Disconnect. Further calls do nothing."""
        self._group = self._opened = None


def report_loss(address: WeightBroadcastAddress, text: str) -> None:
    """Notify the sender that a receiver died, so that it stops waiting. No-op if the sender is gone."""
    with suppress(RuntimeError):
        connect_store(_store_address(address), _GRACE_S).set(_LOST, text)


def _store_address(address: WeightBroadcastAddress) -> StoreAddress:
    return StoreAddress(address.host, address.port, address.secret)


class WeightBroadcastSender(_Member):
    """Rank 0 of a weight broadcast. It does not wait for receivers, which connect before or during the first `send`.

    A lost receiver cannot be replaced: open a new sender and connect all receivers to it.

    Args:
        address: its `host` is this machine's address as seen by the receivers.
        bucket_bytes: maximum size of a message, and the memory that a transfer needs besides its source.

    Raises:
        WeightTransferError: the port is in use.
    """

    def __init__(self, address: WeightBroadcastAddress, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(address, 0, is_sender=True)
        self._bucket_bytes = bucket_bytes

    def send(self, source: Iterable[tuple[str, Tensor]], version: int, checksum: bool = False) -> None:
        """Send (name, tensor) pairs; return when every receiver has received all of them.

        The source is iterated once and to its end, even if a receiver fails: other ranks may take part in a
        collective export. Tensors may be on any device and have any strides.

        Args:
            source: pairs to send, e.g. a `WeightSource`.
            version: version that every receiver must be waiting for.
            checksum: send a CRC-32 with every piece, at about the cost of a copy.

        Raises:
            WeightTransferError: the source failed, or a receiver failed, is late or waits for another version. The
                message has the rank, its name and its error.
        """
        self._begin()
        tensors = iter(source)
        try:
            self._check_usable()
            if self._group is None:
                self._post(Header(opens_group=True), version)
                self._open_group()
            for header, payload in pack_buckets(tensors, self._buffers.take(self._bucket_bytes), checksum):
                self._post(header, version)
                self._send_payload(payload, checksum)
                del payload  # free it before the source creates the next tensor
            self._await_receivers(version)
        except BaseException as error:
            wrapped = _as_transfer_error(error, version)
            self._post_error(Header(error=str(wrapped) or type(error).__name__))
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

    def _post(self, header: Header, version: int) -> None:
        """Post the next header once all receivers wait for it."""
        self._await_receivers(version)
        self._store.set(self._key("header"), header.encode())
        self._step += 1

    def _post_error(self, header: Header) -> None:
        """Post an error for receivers that may have disconnected."""
        try:
            self._store.set(self._key("header"), header.encode())
        except (RuntimeError, WeightTransferError):
            self._broken = self._broken or "the store is closed"

    def _await_receivers(self, version: int) -> None:
        """Wait until all receivers are ready for the current step.

        Raises:
            WeightTransferError: a receiver reported an error or is late.
        """
        receivers = range(1, self.address.world_size)
        self._wait_for_all()
        ready = [rank for rank in receivers if self._store.check([self._key("ready", rank)])]
        for rank in ready:
            self._check_ready(rank, version)
        late = [self._name(rank) for rank in receivers if rank not in ready]
        if late:
            raise WeightTransferError(
                f"weight transfer of version {version}: waited {self.address.timeout_s:g} s for {', '.join(late)}"
            )
        for key in (self._key("all_ready"), self._key("count")):
            self._store.delete_key(key)
        if self._step:  # all receivers have read the previous header
            self._store.delete_key(f"{self._transfer}/{self._step - 1}/header/0")

    def _wait_for_all(self) -> bool:
        """Wait for all receivers; return False on timeout.

        Raises:
            WeightTransferError: `report_loss` reported a dead receiver.
        """
        until = time.monotonic() + self.address.timeout_s
        while not self._wait(self._key("all_ready"), min(_POLL_S, max(until - time.monotonic(), 0.001))):
            if self._store.check([_LOST]):
                self._broken = "a receiver was lost"
                raise WeightTransferError(f"weight transfer: {self._store.get(_LOST).decode()}")
            if time.monotonic() >= until:
                return False
        return True

    def _check_ready(self, rank: int, version: int) -> None:
        state = json.loads(self._store.get(self._key("ready", rank)))
        self._store.delete_key(self._key("ready", rank))
        if state["error"]:
            raise WeightTransferError(f"weight transfer of version {version}: {self._name(rank)}: {state['error']}")
        if state["version"] != version:
            raise WeightTransferError(
                f"weight transfer of version {version}: {self._name(rank)} waits for version {state['version']}"
            )

    def _name(self, rank: int) -> str:
        known = self._store.check([f"member/{rank}"])
        return f"rank {rank} ({self._store.get(f'member/{rank}').decode() if known else 'never connected'})"


class WeightBroadcastReceiver(_Member):
    """A receiver of a weight broadcast (rank 1 or above). It waits for the sender's store, not for other receivers.

    Args:
        address: `WeightBroadcastSender.address`.
        rank: rank of this receiver; default `address.first_rank`.
        name: name in errors, besides process ID and host.

    Raises:
        WeightTransferError: the sender's store cannot be reached.
    """

    def __init__(self, address: WeightBroadcastAddress, rank: int | None = None, name: str = "") -> None:
        rank = address.first_rank if rank is None else rank
        if not 0 < rank < address.world_size:
            raise ValueError(f"WeightBroadcastReceiver: rank {rank} is not in 1..{address.world_size - 1}")
        super().__init__(address, rank, is_sender=False)
        name = f"{name + ', ' if name else ''}process {os.getpid()} on {socket.gethostname()}"
        self._store.set(f"member/{rank}", name)

    @contextmanager
    def receive(self, version: int, accept: Accept | None = None) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Receive a version: iterate the (name, tensor) pairs to the end within the `with` block.

        Tensors are on the CPU. The caller may keep them, but a small tensor keeps its whole bucket alive. Besides,
        only one bucket, or one larger tensor, is held at a time.

        Args:
            version: version that the sender must send next.
            accept: rejects a bucket by raising, before any of its tensors is yielded.

        Raises:
            WeightTransferError: the sender failed or is late, a checksum differs, or the iteration ended early. An
                exception raised in the block propagates unchanged. The sender raises the same text.
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
            if accept is not None:
                accept(header.tensors, header.last)
            yield from received
            del received  # free it before the next bucket is allocated
            if header.last:
                break
        ended.append(True)

    def _report(self, version: int, error: str = "") -> None:
        """Report readiness for the current step, or an error; the last receiver wakes the sender."""
        with self._reaching_sender(version):
            self._store.set(self._key("ready", self._rank), json.dumps({"version": version, "error": error}))
            if self._store.add(self._key("count"), 1) == self.address.world_size - 1 or error:
                self._store.set(self._key("all_ready"), "")

    def _report_error(self, version: int, error: BaseException) -> None:
        text = str(error) if isinstance(error, WeightTransferError) else f"{type(error).__name__}: {error}"
        with suppress(WeightTransferError):  # the sender is gone
            self._report(version, text)

    @contextmanager
    def _reaching_sender(self, version: int) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            self._broken = "the sender is gone"
            raise WeightTransferError(
                f"weight transfer of version {version}: rank {self._rank} lost the sender: {error}"
            ) from error

    def _next_header(self, version: int) -> Header:
        key, patience = self._key("header"), self.address.timeout_s + _GRACE_S
        with self._reaching_sender(version):
            posted = self._wait(key, patience)
            data = self._store.get(key) if posted else b""
        if not posted:
            raise WeightTransferError(
                f"weight transfer of version {version}: rank {self._rank} waited {patience:g} s for the sender at "
                f"{self.address.host}:{self.address.port}"
            )
        header = Header.decode(data)
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


def _as_transfer_error(error: BaseException, version: int) -> BaseException:
    if isinstance(error, WeightTransferError) or not isinstance(error, Exception):
        return error
    return WeightTransferError(f"weight transfer of version {version}: {type(error).__name__}: {error}")
