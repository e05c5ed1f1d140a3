"""Rendezvous of a weight transfer: a store on the trainer's rank 0, in which all members meet step by step.

Before each step every receiver reports that it is ready, or its error. The sender then posts the next message, or its
error. So an error of one side reaches the other as text, and every wait has a time limit. This is the same for every
backend; what moves the bytes between two steps is not.

The sender waits for receivers in one place, `_await_receivers`, which is the watchdog of all backends: it names the
rank that is late.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import Store  # not exported by torch.distributed

from roll_gspo.errors import WeightTransferError
from roll_gspo.rendezvous import StoreAddress, connect_store, open_store
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_update import CONNECTING

_GRACE_S = 5.0  # receivers wait longer than the sender, which can name the late rank
_LOST = "lost"  # key of the message of `report_loss`
_FAILED = "failed"  # key of the sender's error, for the controller
_POLL_S = 1.0  # interval at which a waiting sender checks for it
_REPORT_S = 0.5  # shortest interval between two progress reports of a trainer rank


class TransferMember:
    """A member of a weight transfer: its store, and its counters of transfers and their steps."""

    def __init__(self, address: WeightBroadcastAddress, rank: int, *, hosts_store: bool) -> None:
        self.address = address
        self._rank = rank
        self._transfer = self._step = 0
        self._broken = ""
        try:
            self._opened: Store | None
            if hosts_store:
                self._opened, where = open_store(address.host, address.timeout_s, address.port)
                self.address = replace(address, port=where.port, secret=where.secret)
            else:
                self._opened = connect_store(_store_address(address), address.timeout_s)
        except (RuntimeError, ValueError, OSError) as error:
            doing = "open the store at" if hosts_store else "reach the sender's store at"
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

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._value(f'member/{rank}') or 'never connected'})"

    def _value(self, key: str) -> str:
        """Return the text under `key`; empty if there is none."""
        return _get(self._store, key)

    def _introduce(self, name: str) -> None:
        """Set the name of this rank in errors."""
        self._store.set(f"member/{self._rank}", f"{name + ', ' if name else ''}{_process_name()}")

    def _late_trainers(self, version: int) -> str:
        """Return the trainer ranks that hold up the export of `version`."""
        ranks = range(self.address.num_trainers)
        reports = [json.loads(self._value(f"export/{rank}") or '[-2, 0, ""]') for rank in ranks]
        positions = [(known_version, count) for known_version, count, _ in reports]
        slowest = min(positions)
        late = [rank for rank in ranks if positions[rank] == slowest]
        where = "has not begun the export" if slowest[0] < version else f"has exported about {slowest[1]} tensors"
        names = ", ".join(f"{rank} ({reports[rank][2]})" if reports[rank][2] else str(rank) for rank in late)
        return f"trainer rank {names} {where}"

    def close(self) -> None:
        """Disconnect. Further calls do nothing."""
        self._opened = None


class ExportMember(TransferMember):
    """A rank of the trainer that takes part in the export. Its progress tells which rank is late."""

    def __init__(self, address: WeightBroadcastAddress, trainer_rank: int, *, hosts_store: bool = False) -> None:
        super().__init__(address, 0, hosts_store=hosts_store)
        self._trainer_rank = trainer_rank
        self.num_exported = 0

    def exporting(self, source: Iterable[tuple[str, Tensor]], version: int) -> Iterator[tuple[str, Tensor]]:
        """Iterate `source` and report the number of tensors so far, at intervals."""
        self.num_exported, reported_at = 0, time.monotonic()
        self._report_export(version)
        for pair in source:
            self.num_exported += 1
            yield pair
            del pair  # free it before the source creates the next tensor
            if time.monotonic() - reported_at > _REPORT_S:
                reported_at = time.monotonic()
                self._report_export(version)
        self._report_export(version)

    def _report_export(self, version: int) -> None:
        state = json.dumps([version, self.num_exported, _process_name()])
        with suppress(RuntimeError, WeightTransferError):  # the sender reports a store that is gone
            self._store.set(f"export/{self._trainer_rank}", state)


class TransferSender(ExportMember):
    """Rank 0 of a weight transfer. It does not wait for receivers, which connect before or during the first transfer.

    Args:
        address: its `host` is this machine's address as seen by the receivers.
        receivers: ranks that report readiness.

    Raises:
        WeightTransferError: the port is in use.
    """

    def __init__(self, address: WeightBroadcastAddress, receivers: Sequence[int]) -> None:
        super().__init__(address, 0, hosts_store=True)
        self._receivers = receivers
        self._posted_failure = False

    def _begin(self) -> None:
        super()._begin()
        if self._posted_failure and self._opened is not None:
            self._opened.delete_key(_FAILED)
            self._posted_failure = False

    def _post(self, message: str) -> None:
        """Post the next message, which all receivers wait for."""
        self._store.set(self._key("header"), message)
        self._step += 1

    def _post_error(self, message: str, text: str) -> None:
        """Post an error for receivers that may have disconnected, and for the controller."""
        try:
            self._store.set(self._key("header"), message)
        except (RuntimeError, WeightTransferError):
            self._broken = self._broken or "the store is closed"
        self._post_failure(text)

    def _post_failure(self, text: str) -> None:
        """Post an error for the controller, which may not get it as the result of a call."""
        self._posted_failure = True
        with suppress(RuntimeError, WeightTransferError):
            self._store.set(_FAILED, text)

    def _await_receivers(self, version: int) -> None:
        """Wait until all receivers are ready for the current step.

        Raises:
            WeightTransferError: a receiver reported an error or is late.
        """
        self._wait_for_all()
        ready = [rank for rank in self._receivers if self._store.check([self._key("ready", rank)])]
        for rank in ready:
            self._check_ready(rank, version)
        if len(ready) < len(self._receivers):
            late = self._late([rank for rank in self._receivers if rank not in ready], version)
            raise WeightTransferError(f"{title(version)}: waited {self.address.timeout_s:g} s for {late}")
        for key in (self._key("all_ready"), self._key("count")):
            self._store.delete_key(key)
        if self._step:  # all receivers have read the previous message
            self._store.delete_key(f"{self._transfer}/{self._step - 1}/header/0")

    def _late(self, ranks: Sequence[int], version: int) -> str:
        """Return a text with the members that hold up the transfer; `ranks` did not report."""
        return ", ".join(self._name(rank) for rank in ranks)

    def _positions(self) -> dict[int, int]:
        """Return the number of tensors that each receiver reported within the current step."""
        return {}

    def _wait_for_all(self) -> bool:
        """Wait for all receivers; return False if none makes progress within the time limit.

        Raises:
            WeightTransferError: `report_loss` reported a dead receiver.
        """
        until = time.monotonic() + self.address.timeout_s
        poll_s = min(_POLL_S, self.address.timeout_s / 4)
        positions: dict[int, int] | None = None
        while not self._wait(self._key("all_ready"), min(poll_s, max(until - time.monotonic(), 0.001))):
            if self._store.check([_LOST]):
                self._broken = "a receiver was lost"
                raise WeightTransferError(f"weight transfer: {self._store.get(_LOST).decode()}")
            now_at = self._positions()
            if positions is not None and now_at != positions:
                until = time.monotonic() + self.address.timeout_s
            positions = now_at
            if time.monotonic() >= until:
                return False
        return True

    def _check_ready(self, rank: int, version: int) -> None:
        state = json.loads(self._store.get(self._key("ready", rank)))
        self._store.delete_key(self._key("ready", rank))
        if state["error"]:
            raise WeightTransferError(f"{title(version)}: {self._name(rank)}: {state['error']}")
        if state["version"] != version:
            raise WeightTransferError(f"{title(version)}: {self._name(rank)} waits for version {state['version']}")


class TransferReceiver(TransferMember):
    """A receiver of a weight transfer (rank 1 or above). It waits for the sender's store, not for other receivers.

    Args:
        address: `TransferSender.address`.
        rank: rank of this receiver.
        num_receivers: number of receivers that report readiness.
        name: name in errors, besides process ID and host.

    Raises:
        WeightTransferError: the sender's store cannot be reached.
    """

    def __init__(self, address: WeightBroadcastAddress, rank: int, num_receivers: int, name: str = "") -> None:
        if not 0 < rank < address.world_size:
            raise ValueError(f"{type(self).__name__}: rank {rank} is not in 1..{address.world_size - 1}")
        super().__init__(address, rank, hosts_store=False)
        self._num_receivers = num_receivers
        self._introduce(name)

    def _report(self, version: int, error: str = "") -> None:
        """Report readiness for the current step, or an error; the last receiver wakes the sender."""
        with self._reaching_sender(version):
            self._store.set(self._key("ready", self._rank), json.dumps({"version": version, "error": error}))
            if self._store.add(self._key("count"), 1) == self._num_receivers or error:
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
            raise WeightTransferError(f"{title(version)}: rank {self._rank} lost the sender: {error}") from error

    def _next_message(self, version: int) -> bytes:
        """Wait for the message of the current step."""
        key, patience = self._key("header"), self.address.timeout_s + _GRACE_S
        with self._reaching_sender(version):
            posted = self._wait(key, patience)
            data = self._store.get(key) if posted else b""
            late = "" if posted else self._late_trainers(version)
        if not posted:
            raise WeightTransferError(
                f"{title(version)}: rank {self._rank} waited {patience:g} s for the sender at "
                f"{self.address.host}:{self.address.port}; {late}"
            )
        return data


class TransferObserver:
    """The controller's view of a transfer: it tells the sender of losses and learns of failures.

    The sender may be gone. Its store is then unreachable, and the methods do nothing.
    """

    def __init__(self, address: WeightBroadcastAddress) -> None:
        self._address = address
        self._opened: Store | None = None

    def report_loss(self, text: str) -> None:
        """Notify the sender that a receiver died, so that it stops waiting."""
        with suppress(RuntimeError):
            self._store().set(_LOST, text)

    def failure(self) -> str:
        """Return the sender's error; empty if there is none."""
        with suppress(RuntimeError):
            return _get(self._store(), _FAILED)
        return ""

    def _store(self) -> Store:
        self._opened = self._opened or connect_store(_store_address(self._address), _GRACE_S)
        return self._opened


def title(version: int) -> str:
    """Return the beginning of the errors of a version."""
    return "weight transfer, connecting" if version == CONNECTING else f"weight transfer of version {version}"


def as_transfer_error(error: BaseException, version: int) -> BaseException:
    """Return `error` as `WeightTransferError`; those that end the process stay as they are."""
    if isinstance(error, WeightTransferError) or not isinstance(error, Exception):
        return error
    return WeightTransferError(f"{title(version)}: {type(error).__name__}: {error}")


def _get(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _store_address(address: WeightBroadcastAddress) -> StoreAddress:
    return StoreAddress(address.host, address.port, address.secret)


def _process_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
