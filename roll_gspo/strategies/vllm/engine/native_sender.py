"""Trainer side of a weight transfer between GPUs: drives vLLM's trainer engines `nccl` and `ipc`.

Every rank of the trainer has a `NativeSender`, because every rank takes part in the export. With `nccl`, rank 0 is the
only one in a communicator with all workers of all engines, and broadcasts packed tensors. With `ipc`, every rank packs
the tensors into a buffer that the worker on the same GPU reads.

An error of an engine must not end the export on rank 0 alone, as the other ranks would wait for it in a collective.
`_Client` therefore records errors, and the export continues without a receiver.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    uid_init_process_group,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.device import local_device
from roll_gspo.strategies.kept_weights import KeptWeights
from roll_gspo.strategies.vllm.engine.ipc_handles import encode_handles
from roll_gspo.strategies.vllm.engine.time_limit import within
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_commands import CommandSender
from roll_gspo.strategies.weight_rendezvous import ExportMember
from roll_gspo.strategies.weight_update import CONNECTING, FULL_MODEL, PROBE, probe_tensor

IPC_BUFFER_BYTES = 2 << 30  # vLLM's default of 1 GiB is too small for the embedding of a 7B model
NCCL_BUFFER_BYTES = 512 << 20
_DEFAULT_BYTES = {"ipc": IPC_BUFFER_BYTES, "nccl": NCCL_BUFFER_BYTES}
Named = Iterable[tuple[str, Tensor]]


class NativeSender:
    """One rank of the trainer in a weight transfer with vLLM's `nccl` or `ipc`.

    Args:
        address: where the engines wait; its `backend` is used.
        buffer_bytes: size of the packed buffer, see `buffer_size`; None for the backend's default.
        commands: connection to the engines on rank 0; None on all other ranks.
    """

    def __init__(
        self, address: WeightBroadcastAddress, buffer_bytes: int | None, commands: CommandSender | None
    ) -> None:
        self._address = address
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._commands = commands
        self._member: ExportMember = commands or ExportMember(address, self._rank)
        self._buffer_bytes = buffer_bytes or _DEFAULT_BYTES[address.backend]
        self._client = _Client(commands)
        self._metadata: list[ParamMeta] = []
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def start(self, source: Named) -> None:
        """Start the backend and send a probe. Every rank calls it while every engine connects.

        Args:
            source: the model's weights, which are exported once to learn names, dtypes and shapes.

        Raises:
            WeightTransferError: the backend does not work here, or an engine failed or is late.
        """
        exported = self._member.exporting(source, CONNECTING)
        self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in exported]
        size = buffer_size(self._metadata, self._buffer_bytes)
        self._client.reset()
        with self._commands.session(CONNECTING) if self._commands else nullcontext():
            self._engine = self._ipc_engine(size) if self._address.backend == "ipc" else self._nccl_engine(size)
            probe = probe_tensor(local_device())
            metadata = [ParamMeta(PROBE, probe.dtype, tuple(probe.shape))]
            self._send(self._member.exporting([(PROBE, probe)], CONNECTING), metadata, PROBE)

    def send(self, source: Named, version: int, kind: str = FULL_MODEL) -> None:
        """Send (name, tensor) pairs; return when every engine has loaded all of them. Every rank calls it.

        Raises:
            WeightTransferError: the source failed, or an engine failed, is late or waits for another version.
        """
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # vLLM exports on a stream that does not wait for the optimizer's
        self._client.reset()
        exported = self._member.exporting(source, version)
        with self._commands.session(version) if self._commands else nullcontext():
            self._send(exported, self._metadata, kind)

    def _send(self, tensors: Named, metadata: list[ParamMeta], kind: str) -> None:
        if self._engine is None:
            raise WeightTransferError("weight transfer: the trainer is not connected; connect first")
        self._client.begin(kind, metadata)
        if self._address.backend == "nccl" and self._commands is not None:
            tensors = KeptWeights(tensors)  # several are packed before they are copied
        self._engine.source = _Source(tensors, metadata)
        try:
            self._engine.send_weights()
        except BaseException as error:
            self._client.give_up(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._engine.source = None
        self._client.raise_problem()

    def close(self) -> None:
        """Disconnect. Further calls do nothing."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        self._member.close()

    def _ipc_engine(self, size: int) -> TrainerWeightTransferEngine[Any]:
        info = IPCTrainerInitInfo(rank=self._rank, packed=True, packed_buffer_size_bytes=size)
        return WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=_Source((), []))

    def _nccl_engine(self, size: int) -> TrainerWeightTransferEngine[Any]:
        # A single buffer, as two buffers are filled on two streams while the export reuses its memory.
        engine = NCCLTrainerWeightTransferEngine(
            client=self._client,
            source=_Source((), []),
            is_sender=self._commands is not None,
            packed=True,
            packed_buffer_size_bytes=size,
            packed_num_buffers=1,
        )
        if self._commands is not None:
            group: Any = self._open_group(self._commands, size)
            engine.model_update_group = group
        return engine

    def _open_group(self, commands: CommandSender, size: int) -> _Group:
        """Open the NCCL communicator with all workers; the ID of NCCL goes through the store."""
        unique_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        world_size, timeout_s = self._address.world_size, self._address.timeout_s
        info = NCCLWeightTransferInitInfo(
            nccl_unique_id_b64=base64.b64encode(unique_id).decode(),
            rank_offset=1,
            world_size=world_size,
            packed=True,
            packed_buffer_size_bytes=size,
            packed_num_buffers=1,
        )
        device = local_device().index
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(self._client.init_weight_transfer_engine, worker_init_payload(info))
            try:
                communicator = within(
                    timeout_s, "start NCCL", lambda: uid_init_process_group(unique_id, 0, world_size, device), device
                )
            except BaseException as error:
                self._client.give_up(f"{type(error).__name__}: {error}")
                raise
            told.result()
        group = _Group(communicator, self._client, commands)
        self._client.on_problem = group.abort
        return group


def buffer_size(metadata: Iterable[ParamMeta], limit: int) -> int:
    """Return the size of the packed buffer in bytes: `limit`, but at least the largest tensor and at most the model."""
    sizes = [meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in metadata]
    probe = probe_tensor("meta").nbytes
    return max(min(limit, sum(sizes)), max(sizes, default=0), probe)


class _Client:
    """vLLM's client (`VLLMWeightSyncClient`) over the commands of this project. It records errors and never raises."""

    def __init__(self, commands: CommandSender | None) -> None:
        self._commands = commands
        self._problem: Exception | None = None
        self._manifest: dict[str, Any] = {}
        self.on_problem: Callable[[], None] = lambda: None
        self.counts = False
        """One command contains many packed buffers, so engines report how many tensors they have loaded."""

    @property
    def has_failed(self) -> bool:
        """True if an engine failed, so that nothing more is sent."""
        return self._problem is not None

    def reset(self) -> None:
        """Forget the errors of an earlier transfer."""
        self._problem = None
        if self._commands is not None:
            self._commands.num_sent = None

    def begin(self, kind: str, metadata: list[ParamMeta]) -> None:
        """Set what `start_weight_update` announces."""
        self._manifest = {"kind": kind}
        if kind != PROBE:
            self._manifest |= {
                "names": [meta.name for meta in metadata],
                "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metadata],
                "shapes": [list(meta.shape) for meta in metadata],
            }

    def raise_problem(self) -> None:
        """Raise the first error since `reset`, if any."""
        if self._problem is not None:
            raise self._problem

    def give_up(self, why: str) -> None:
        """End the wait for engines after an error of this process."""
        if self._commands is not None:
            self._commands.give_up(why)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Start the backend of every engine."""
        self._run("init", init_info)

    def start_weight_update(self) -> None:
        """Announce the update; every engine checks the manifest."""
        self._run("start", self._manifest)
        if self._commands is not None and self.counts:
            self._commands.num_sent = 0

    def update_weights(self, update_info: Any) -> None:
        """Let every engine receive tensors."""
        fields = dict(update_info)
        if "ipc_handles_pickled" in fields:
            fields = {key: value for key, value in fields.items() if value is not None}
            fields["ipc_handles"] = encode_handles(fields["ipc_handles"])
        self._run("update", fields)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let every engine complete the update."""
        if self._commands is not None:
            self._commands.num_sent = None
        self._run("finish", {})

    def _run(self, name: str, arguments: dict[str, Any]) -> None:
        if self._problem is not None or self._commands is None:
            return
        try:
            self._commands.command(name, arguments)
        except Exception as error:
            self._problem = error
            if name == "update":
                self._commands.fail(str(error))
                self.on_problem()


class _Group:
    """An NCCL communicator that another thread can abort."""

    def __init__(self, communicator: Any, client: _Client, commands: CommandSender) -> None:
        self._communicator = communicator
        self._client = client
        self._commands = commands
        client.counts = True

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Broadcast a packed buffer; do nothing once an engine has failed."""
        if self._client.has_failed:
            return
        self._commands.num_sent = self._commands.num_exported
        self._communicator.broadcast(tensor, src=src, stream=stream)

    def abort(self) -> None:
        """End a broadcast that waits for a lost or late worker."""
        self._communicator.destroy()

    def destroy(self) -> None:
        """Close the communicator."""
        self._communicator.destroy()


class _Source(WeightSource):
    """The tensors of one update in vLLM's form."""

    def __init__(self, tensors: Named, metadata: list[ParamMeta]) -> None:
        self._tensors = tensors
        self._metadata = metadata

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            yield name, tensor.detach()
