"""The trainer's side of a weight transfer to engines in other processes, on one rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import distributed as dist

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.base import NativeWeightSender, TrainStrategy, WeightSource
from roll_gspo.strategies.weight_broadcast import BUCKET_BYTES, WeightBroadcastSender
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_commands import CommandSender
from roll_gspo.strategies.weight_rendezvous import ExportMember
from roll_gspo.strategies.weight_update import FULL_MODEL, check_kind, kind_of

# Called with (address, bytes of a bucket or None, connection to the engines or None on ranks above 0).
BuildNativeSender = Callable[[WeightBroadcastAddress, int | None, CommandSender | None], NativeWeightSender]


class WeightExport:
    """Exports the live weights of a trainer with the backend that the address names.

    Rank 0 opens the transfer, then every rank joins it, then every rank sends each version.

    Args:
        strategy: the engine that holds the model.
        build_native: builds the sender of a transfer between GPUs; None if the generation engine has none.
    """

    def __init__(self, strategy: TrainStrategy, build_native: BuildNativeSender | None) -> None:
        self._strategy = strategy
        self._build_native = build_native
        self._opened: WeightBroadcastSender | CommandSender | None = None
        self._native: NativeWeightSender | None = None
        self._member: ExportMember | None = None
        self._bucket_bytes: int | None = None
        self._checksum = False

    def open(self, address: WeightBroadcastAddress, bucket_bytes: int | None, checksum: bool) -> WeightBroadcastAddress:
        """Open a transfer on rank 0 and return its address; close an earlier one."""
        self._close()
        if address.backend == "gloo":
            self._opened = WeightBroadcastSender(address, bucket_bytes or BUCKET_BYTES)
        else:
            self._opened = CommandSender(address)
        self._checksum = checksum
        return self._opened.address

    def join(self, address: WeightBroadcastAddress, bucket_bytes: int | None) -> None:
        """Join the opened transfer. Every rank calls it while the engines connect.

        Raises:
            WeightTransferError: the backend does not work here, or an engine failed or is late.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank:
            self._close()
        if address.backend == "gloo":
            self._member = self._opened or ExportMember(address, rank)
            return
        if self._build_native is None:
            raise WeightTransferError(
                f"weight_transfer.backend: {address.backend} is not a backend of this generation engine; set gloo"
            )
        weights = self._strategy.weights()
        check_kind(kind_of(weights), FULL_MODEL)  # adapters travel through host memory
        commands = self._opened if isinstance(self._opened, CommandSender) else None
        self._native = self._build_native(address, bucket_bytes, commands)
        self._native.start(weights)

    def send(self, version: int) -> None:
        """Send the live weights. Ranks without a connection only take part in the export.

        Raises:
            WeightTransferError: an engine did not receive the weights.
        """
        weights: WeightSource = self._strategy.weights()
        if self._native is not None:
            self._native.send(weights, version)
        elif isinstance(self._opened, WeightBroadcastSender):
            self._opened.send(weights, version, self._checksum, kind_of(weights))
        else:
            for _ in weights if self._member is None else self._member.exporting(weights, version):
                pass

    def _close(self) -> None:
        for member in (self._native, self._opened, self._member):
            if member is not None:
                member.close()
        self._native = self._opened = self._member = None
