"""Weights between processes: one sender, any number of receivers, over a gloo group of their own.

    sender = WeightBroadcastSender(WeightBroadcastAddress("127.0.0.1", port=0, world_size=2))  # trainer, rank 0
    receiver = WeightBroadcastReceiver(sender.address, rank=1)  # engine; waits for the store only
    sender.send(source, version=1)  # at the same time as ...
    with receiver.receive(version=1) as weights: load(weights)            # ... this, on every receiver

Tensors travel as bytes in buckets. Before each bucket all receivers say that they are ready, or what went wrong with
them; then the sender posts the bucket's manifest (names, shapes, dtypes), or what went wrong with it, and broadcasts.
So an error of one side reaches the other as text and nobody waits in a broadcast that has no counterpart. Both texts
go through the TCP store that the sender opens. The default process group is never touched.
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
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed has them without exporting them

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_broadcast_format import Accept, Buffers, Header, bytes_of, crc32, pack, pieces, room

BUCKET_BYTES = 16 << 20  # measured: larger ones fall out of the processor's cache between the ends
_GRACE_S = 5.0  # receivers wait longer than the sender does: it knows who is late and says so
_LISTED = 8
_LOST = "lost"  # key of what `report_loss` says
_LOOK_S = 1.0  # how often a sender that waits looks for it


class _Member:
    """What both ends have: the store, the group, and a count of transfers and of the buckets in the current one."""

    def __init__(self, address: WeightBroadcastAddress, rank: int, is_sender: bool) -> None:
        self.address = address
        self._rank = rank
        self._group: dist.ProcessGroupGloo | None = None
        self._transfer = self._step = 0
        self._broken = ""
        self._buffers = Buffers()
        try:
            self._opened: TCPStore | None = TCPStore(
                address.host,
                address.port,
                is_master=is_sender,
                timeout=timedelta(seconds=address.timeout_s),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            doing = "open the store at" if is_sender else "reach the sender's store at"
            raise WeightTransferError(
                f"weight transfer: rank {rank} could not {doing} {address.host}:{address.port} within "
                f"{address.timeout_s:g} s: {error}"
            ) from error

    @property
    def _store(self) -> TCPStore:
        if self._opened is None:
            raise WeightTransferError("weight transfer: the wire was closed; connect anew")
        return self._opened

    def _key(self, kind: str, rank: int = 0) -> str:
        return f"{self._transfer}/{self._step}/{kind}/{rank}"

    def _wait(self, key: str, timeout_s: float) -> bool:
        """Whether `key` was set in time."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return False
        return True

    def _begin(self) -> None:
        self._transfer += 1
        self._step = 0

    def _check_whole(self) -> None:
        if self._broken:
            raise WeightTransferError(f"weight transfer: the wire broke before ({self._broken}); connect anew")

    def _open_group(self) -> None:
        """Called by all members at once; each listens on the interface that leads to the sender."""
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timedelta(seconds=self.address.timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address.own_ip())]
        store = PrefixStore("group", self._store)
        with self._breaking("open the group"):
            self._group = dist.ProcessGroupGloo(store, self._rank, self.address.world_size, options)

    def _broadcast(self, tensor: Tensor) -> None:
        """From rank 0 into the contiguous CPU tensors of the others, in bytes."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        with self._breaking("broadcast"):
            self._group.broadcast([bytes_of(tensor)], options).wait()  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def _breaking(self, doing: str) -> Iterator[None]:
        """After an error in here the members are out of step for good."""
        try:
            yield
        except BaseException as error:
            self._broken = f"{type(error).__name__} in {doing}"
            if not isinstance(error, RuntimeError):
                raise
            raise WeightTransferError(
                f"weight transfer: rank {self._rank} could not {doing} with the {self.address.world_size} members "
                f"of the wire: {error}"
            ) from error

    def close(self) -> None:
        """Leave the wire; calling it again does nothing."""
        self._group = self._opened = None


def report_loss(address: WeightBroadcastAddress, text: str) -> None:
    """Tell the sender that a receiver is lost, so that it does not wait for it; a wire that is gone needs no word."""
    with suppress(RuntimeError):
        store = TCPStore(address.host, address.port, is_master=False, timeout=timedelta(seconds=_GRACE_S))
        store.set(_LOST, text)


class WeightBroadcastSender(_Member):
    """Rank 0 of a wire. Opening it waits for nobody; the receivers connect before, or while, the first version is sent.

    A receiver that was lost cannot be replaced: open a new wire and connect all receivers to it.

    Args:
        address: its `host` is this machine's as the receivers reach it.
        bucket_bytes: largest piece that is sent at once, and all that a transfer holds beside its source.

    Raises:
        WeightTransferError: the port is taken.
    """

    def __init__(self, address: WeightBroadcastAddress, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(address, 0, is_sender=True)
        self.address = replace(address, port=self._store.port)
        self._bucket_bytes = bucket_bytes

    def send(self, source: Iterable[tuple[str, Tensor]], version: int, checksum: bool = False) -> None:
        """Send (name, tensor) pairs; returns when every receiver has taken the last one.

        The source is iterated once, and to its end even where a receiver fails: a collective export has other ranks
        that take part in it. Tensors may lie on any device and in any order of strides.

        Args:
            source: e.g. a `WeightSource`.
            version: that every receiver must be waiting for.
            checksum: send a CRC-32 with every piece; it costs about as much time as a copy.

        Raises:
            WeightTransferError: the source failed, a receiver is late, waits for another version or failed;
                with its rank and name, and the error's own text.
        """
        self._begin()
        tensors = iter(source)
        try:
            self._check_whole()
            if self._group is None:
                self._post(Header(opens_group=True), version)
                self._open_group()
            for header, payload in pack(tensors, self._buffers.take(self._bucket_bytes), checksum):
                self._post(header, version)
                self._send_payload(payload, checksum)
                del payload  # a source may make its next tensor only when this one is gone
            self._await_receivers(version)
        except BaseException as error:
            wrapped = _as_transfer_error(error, version)
            self._tell(Header(error=str(wrapped) or type(error).__name__))
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
        """Announce what comes, once everybody waits for it."""
        self._await_receivers(version)
        self._store.set(self._key("header"), header.encode())
        self._step += 1

    def _tell(self, header: Header) -> None:
        """An error, to receivers that may have left."""
        try:
            self._store.set(self._key("header"), header.encode())
        except (RuntimeError, WeightTransferError):
            self._broken = self._broken or "the store is gone"

    def _await_receivers(self, version: int) -> None:
        """Until all are ready for the current step.

        Raises:
            WeightTransferError: what the first that failed said, or who is late.
        """
        everyone = range(1, self.address.world_size)
        self._wait_for_all()
        ready = [rank for rank in everyone if self._store.check([self._key("ready", rank)])]
        for rank in ready:
            self._judge(rank, version)
        late = [self._name(rank) for rank in everyone if rank not in ready]
        if late:
            raise WeightTransferError(
                f"weight transfer of version {version}: waited {self.address.timeout_s:g} s for {', '.join(late)}"
            )
        for key in (self._key("all_ready"), self._key("count")):
            self._store.delete_key(key)
        if self._step:  # everybody has read the header before this one
            self._store.delete_key(f"{self._transfer}/{self._step - 1}/header/0")

    def _wait_for_all(self) -> bool:
        """Whether all were ready in time.

        Raises:
            WeightTransferError: somebody who watches the receivers says that one is lost.
        """
        until = time.monotonic() + self.address.timeout_s
        while not self._wait(self._key("all_ready"), min(_LOOK_S, max(until - time.monotonic(), 0.001))):
            if self._store.check([_LOST]):
                self._broken = "a receiver was lost"
                raise WeightTransferError(f"weight transfer: {self._store.get(_LOST).decode()}")
            if time.monotonic() >= until:
                return False
        return True

    def _judge(self, rank: int, version: int) -> None:
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
    """A rank from 1 of a wire; waits for the sender's store to be open, not for other receivers.

    Args:
        address: as `WeightBroadcastSender.address` says it.
        rank: of this receiver; by default `address.first_rank`.
        name: says in errors who this is; by default host and process id.

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
        """Take a version: iterate the (name, tensor) pairs to their end within the `with` block.

        Tensors are on the CPU. They may be kept, but a small one keeps its whole bucket alive; apart from
        what is kept, one bucket, or one tensor that is larger than it, is held at a time.

        Args:
            version: that the sender must send next.
            accept: may refuse a bucket by raising, before any of its tensors is handed out.

        Raises:
            WeightTransferError: the sender failed or is late, a checksum differs, or the iteration ended early; an
                error raised in the block passes as it is. In each case the sender raises its text too.
        """
        self._begin()
        ended: list[bool] = []
        try:
            self._check_whole()
            yield self._tensors(version, accept, ended)
            if not ended:
                raise WeightTransferError(f"weight transfer of version {version}: the receiver stopped before its end")
            self._say(version)
        except BaseException as error:
            self._say_error(version, error)
            raise

    def _tensors(self, version: int, accept: Accept | None, ended: list[bool]) -> Iterator[tuple[str, Tensor]]:
        while True:
            self._say(version)
            header = self._next_header(version)
            if header.opens_group:
                self._open_group()
                continue
            received = self._take(header)
            if accept is not None:
                accept(header.tensors, header.last)
            yield from received
            del received  # or it would live on beside the next one
            if header.last:
                break
        ended.append(True)

    def _say(self, version: int, error: str = "") -> None:
        """This receiver is ready for the current step, or what went wrong with it; the last one wakes the sender."""
        with self._reaching_sender(version):
            self._store.set(self._key("ready", self._rank), json.dumps({"version": version, "error": error}))
            if self._store.add(self._key("count"), 1) == self.address.world_size - 1 or error:
                self._store.set(self._key("all_ready"), "")

    def _say_error(self, version: int, error: BaseException) -> None:
        text = str(error) if isinstance(error, WeightTransferError) else f"{type(error).__name__}: {error}"
        with suppress(WeightTransferError):  # nobody is left to hear it
            self._say(version, text)

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
        """One bucket; all its pieces are received before anything is said of them."""
        payload, tensors = room(header, self._buffers)
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
                f"weight transfer: rank {self._rank} received other bytes than were sent (the checksums differ) of "
                f"{', '.join(names[:_LISTED])}{more}"
            )
        return tensors


def _as_transfer_error(error: BaseException, version: int) -> BaseException:
    if isinstance(error, WeightTransferError) or not isinstance(error, Exception):
        return error
    return WeightTransferError(f"weight transfer of version {version}: {type(error).__name__}: {error}")
