"""Worker side of a weight transfer from another process, with every backend.

A vLLM engine is built for one class of weight transfer. `ReceivingEngine` is that class. It selects the backend when
the trainer connects, so that a backend that does not work here can be replaced without a new engine. With `nccl` and
`ipc`, vLLM's own engines receive the tensors. The lifecycle around them is ours: the manifest is checked before any
weight changes, and a parameter that received nothing is an error, which vLLM would only log.

A worker never raises through vLLM's RPC: if one of several workers raised, the replies of the others would stay queued
and be read as replies to later calls. Workers record the error and `BroadcastTransfer` collects it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.vllm.engine.adapters import AdapterLoader
from roll_gspo.strategies.vllm.engine.ipc_handles import decode_handles
from roll_gspo.strategies.vllm.engine.loading import ModelLoader, shapes_of_full_model
from roll_gspo.strategies.vllm.engine.manifest import differences
from roll_gspo.strategies.vllm.engine.time_limit import within
from roll_gspo.strategies.weight_broadcast import WeightBroadcastReceiver
from roll_gspo.strategies.weight_broadcast_address import WeightBroadcastAddress
from roll_gspo.strategies.weight_broadcast_format import TensorMeta
from roll_gspo.strategies.weight_commands import LoadedReport
from roll_gspo.strategies.weight_update import ADAPTER, FULL_MODEL, PROBE, probe_tensor

KEPT = "; the old weights were kept"
_NOT_CONNECTED = "weight transfer: the engine is not connected; call connect first"
_NATIVE: dict[str, type[WeightTransferEngine[Any, Any]]] = {
    "nccl": NCCLWeightTransferEngine,
    "ipc": IPCWeightTransferEngine,
}


@dataclass
class ReceivingInitInfo(WeightTransferInitInfo):
    """The fields of a `WeightBroadcastAddress`, and the init info of vLLM's engine if the backend has one.

    `lora` has the fields of a `LoraSetup` if the engine receives adapters.
    """

    address: dict[str, Any]
    native: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None


@dataclass
class ReceivingUpdateInfo(WeightTransferUpdateInfo):
    """The version and kind that the sender sends, and the update info of vLLM's engine if the backend has one."""

    version: int
    kind: str = FULL_MODEL
    native: dict[str, Any] | None = None


class _Backend(Protocol):
    """The part of a `ReceivingEngine` that one backend needs."""

    def start(self) -> None: ...

    def receive(self, update: ReceivingUpdateInfo) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class ReceivingEngine(WeightTransferEngine[ReceivingInitInfo, ReceivingUpdateInfo]):
    """Receives weights with the backend that the address names, and loads the model layer by layer."""

    init_info_cls = ReceivingInitInfo
    update_info_cls = ReceivingUpdateInfo
    problem = ""
    _backend: _Backend | None = None
    _loader: ModelLoader | None = None
    _adapter_loader: AdapterLoader | None = None
    _adapters: WeightBroadcastReceiver | None = None

    def init_transfer_engine(self, init_info: ReceivingInitInfo) -> None:
        """Connect to the sender; closes an earlier connection."""
        address = WeightBroadcastAddress(**init_info.address)
        if init_info.lora is not None:
            lora = LoraSetup(**init_info.lora)
            self._record_problem(lambda: self._connect_adapters(address, lora))
        else:
            self._record_problem(lambda: self._connect(address, init_info.native))

    def _connect_adapters(self, address: WeightBroadcastAddress, lora: LoraSetup) -> None:
        self.shutdown()
        self._adapter_loader = self._adapter_loader or AdapterLoader(self.model, self.model_config, lora)
        worker = self.parallel_config.rank
        self._adapters = WeightBroadcastReceiver(address, address.first_rank + worker, f"vllm worker {worker}", ADAPTER)

    def receive_adapter(self, version: int, number: int) -> int:
        """Receive the adapter of `version` and load it; return its number, see `AdapterLoader.load`."""
        numbers = [0]
        self._record_problem(lambda: numbers.append(self._receive_adapter(version, number)))
        return numbers[-1]

    def _receive_adapter(self, version: int, number: int) -> int:
        if self._adapters is None or self._adapter_loader is None:
            raise WeightTransferError(_NOT_CONNECTED)
        with self._adapters.receive(version) as received:
            # Small tensors keep their whole bucket alive.
            tensors = [(name, tensor.clone()) for name, tensor in received]
            return self._adapter_loader.load(version, number, tensors)

    def _connect(self, address: WeightBroadcastAddress, native: dict[str, Any] | None) -> None:
        self.shutdown()
        self._loader = self._loader or ModelLoader(self.model, self.model_config)
        worker = self.parallel_config.rank
        if native is None:
            self._backend = _Gloo(address, worker, self._loader, shapes_of_full_model(self.model_config))
        else:
            engine = _NATIVE[address.backend](self.config, self.vllm_config, self.device, self.model)
            self._backend = _Native(address, worker, self._loader, engine, native)

    def start_weight_update(self) -> None:
        """Prepare the backend; the old weights stay usable until the first tensors arrive."""
        self._record_problem(lambda: self._connected().start())

    def receive_weights(self, update_info: ReceivingUpdateInfo) -> None:
        """Receive and load all tensors, or a part of them."""
        self._record_problem(lambda: self._connected().receive(update_info))

    def finish_weight_update(self) -> None:
        """Complete the load, unless it has failed."""
        if not self.problem:
            self._record_problem(lambda: self._connected().finish())

    def shutdown(self) -> None:
        """Disconnect from the sender."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        if self._adapters is not None:
            self._adapters.close()
            self._adapters = None

    def _connected(self) -> _Backend:
        if self._backend is None:
            raise WeightTransferError(_NOT_CONNECTED)
        return self._backend

    def _record_problem(self, work: Callable[[], None]) -> None:
        self.problem = ""
        try:
            work()
        except Exception as error:
            is_transfer_error = isinstance(error, WeightTransferError)
            self.problem = str(error) if is_transfer_error else f"weight transfer: {type(error).__name__}: {error}"


class _Gloo:
    """Receives the weight broadcast of `weight_broadcast`."""

    def __init__(
        self,
        address: WeightBroadcastAddress,
        worker: int,
        loader: ModelLoader,
        expected: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._loader = loader
        self._expected = expected
        self._receiver = WeightBroadcastReceiver(address, address.first_rank + worker, f"vllm worker {worker}")

    def start(self) -> None:
        """Do nothing: `receive` loads the whole model."""

    def receive(self, update: ReceivingUpdateInfo) -> None:
        arrived: list[tuple[str, tuple[int, ...], torch.dtype]] = []

        def accept(metas: Sequence[TensorMeta], last: bool) -> None:
            arrived.extend((meta.name, meta.shape, meta.torch_dtype) for meta in metas)
            seen = {name for name, _, _ in arrived}
            expected = self._expected if last else {n: s for n, s in self._expected.items() if n in seen}
            if wrong := differences(expected, arrived):
                raise WeightTransferError("weight transfer: " + "; ".join(wrong) + self._state_after_rejection())

        with self._receiver.receive(update.version, accept) as weights:
            first = next(weights, None)  # the old weights stay valid until the first tensor arrives
            self._loader.replace(_chained(first, weights))

    def _state_after_rejection(self) -> str:
        return "; build a new engine" if self._loader.half_loaded else KEPT

    def finish(self) -> None:
        """Do nothing: `receive` loads the whole model."""

    def close(self) -> None:
        self._receiver.close()


class _Native:
    """Receives with one of vLLM's engines, in one or several parts. The manifest was checked before."""

    def __init__(
        self,
        address: WeightBroadcastAddress,
        worker: int,
        loader: ModelLoader,
        engine: WeightTransferEngine[Any, Any],
        init_info: dict[str, Any],
    ) -> None:
        self._loader = loader
        self._engine = engine
        self._report = LoadedReport(address, worker)
        self._count = 0
        self._receiving = False
        info = engine.parse_init_info(init_info)
        device = engine.device.index
        within(address.timeout_s, f"start {address.backend}", lambda: engine.init_transfer_engine(info), device)

    def start(self) -> None:
        self._receiving = False  # an update that failed has left the model half loaded, which `begin` refuses

    def receive(self, update: ReceivingUpdateInfo) -> None:
        fields = dict(update.native or {})
        if "ipc_handles" in fields:
            fields["ipc_handles"] = decode_handles(fields["ipc_handles"])
        info = self._engine.parse_update_info(fields)
        if update.kind == FULL_MODEL and not self._receiving:
            self._loader.begin()
            self._receiving, self._count = True, 0
        target: Any = _Target(_check_probe if update.kind == PROBE else lambda pairs: self._load(update.version, pairs))
        self._engine.set_weight_update_target(target, self._engine.model_config)
        try:
            self._engine.receive_weights(info)
        finally:
            self._engine.reset_weight_update_target()

    def _load(self, version: int, weights: list[tuple[str, Tensor]]) -> None:
        self._loader.load(weights)
        self._count += len(weights)
        self._report.report(version, self._count)

    def finish(self) -> None:
        if isinstance(self._engine, IPCWeightTransferEngine):
            self._engine.shutdown()  # closes the trainer's memory, so that it can be freed there
        if self._receiving:
            self._receiving = False
            self._loader.finish()

    def close(self) -> None:
        self._engine.shutdown()
        self._report.close()


@dataclass
class _Target:
    """Stands for the model in vLLM's engine, which calls nothing but `load_weights`."""

    load_weights: Callable[[list[tuple[str, Tensor]]], None]


def _check_probe(weights: list[tuple[str, Tensor]]) -> None:
    if not all(torch.equal(tensor.cpu(), probe_tensor()) for _, tensor in weights):
        raise WeightTransferError("weight transfer: the backend delivered wrong bytes")


def _chained(first: tuple[str, Tensor] | None, rest: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    if first is not None:
        yield first
    yield from rest
