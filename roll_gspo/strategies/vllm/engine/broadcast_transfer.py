"""vLLM's weight transfer with backend `gloo`: every worker of an engine receives the trainer's weight broadcast.

vLLM imports this module in each of its workers because the engine's `worker_extension_cls` is defined here; the import
registers the backend. A worker never raises through vLLM's RPC: if one of several workers raised, the replies of the
others would stay queued and be read as replies to later calls. Workers record the error and `BroadcastTransfer`
collects it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.vllm.engine.loading import load_full_model, shapes_of_full_model
from roll_gspo.strategies.vllm.engine.manifest import differences
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver
from roll_gspo.strategies.weight_broadcast_format import TensorMeta

GLOO = "gloo"


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """A `WeightBroadcastAddress`; worker r of the engine is rank `first_rank + r`."""

    host: str
    port: int
    world_size: int
    first_rank: int
    timeout_s: float
    secret: str


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The version that the sender sends next."""

    version: int


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives the weight broadcast and loads the model layer by layer as the buckets arrive."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _receiver: WeightBroadcastReceiver | None = None
    _half_loaded = False
    problem = ""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Connect to the sender; closes an earlier connection."""
        self._record_problem(lambda: self._connect(WeightBroadcastAddress(**asdict(init_info))))

    def _connect(self, address: WeightBroadcastAddress) -> None:
        self.shutdown()
        self._expected = shapes_of_full_model(self.model_config)
        worker = self.parallel_config.rank
        self._receiver = WeightBroadcastReceiver(address, address.first_rank + worker, f"vllm worker {worker}")

    def start_weight_update(self) -> None:
        """Do nothing: the old weights stay usable until the first manifest is accepted."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load the whole model."""
        self._record_problem(lambda: self._receive(update_info.version))

    def _receive(self, version: int) -> None:
        if self._receiver is None:
            raise WeightTransferError("weight transfer: the engine is not connected; call connect first")
        arrived: list[tuple[str, tuple[int, ...], torch.dtype]] = []

        def accept(metas: Sequence[TensorMeta], last: bool) -> None:
            arrived.extend((meta.name, meta.shape, meta.torch_dtype) for meta in metas)
            seen = {name for name, _, _ in arrived}
            expected = self._expected if last else {n: s for n, s in self._expected.items() if n in seen}
            if wrong := differences(expected, arrived):
                raise WeightTransferError("weight transfer: " + "; ".join(wrong) + self._state_after_rejection())

        with self._receiver.receive(version, accept) as weights:
            if self._half_loaded:
                raise WeightTransferError("weight transfer: an earlier transfer stopped half-way; build a new engine")
            first = next(weights, None)  # the old weights stay valid until the first tensor arrives
            self._half_loaded = True
            load_full_model(self.model, self.model_config, _chained(first, weights))
            self._half_loaded = False

    def _state_after_rejection(self) -> str:
        return "; build a new engine" if self._half_loaded else "; the old weights were kept"

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` loads the whole model."""

    def shutdown(self) -> None:
        """Disconnect from the sender."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _record_problem(self, work: Callable[[], None]) -> None:
        self.problem = ""
        try:
            work()
        except Exception as error:
            is_transfer_error = isinstance(error, WeightTransferError)
            self.problem = str(error) if is_transfer_error else f"weight transfer: {type(error).__name__}: {error}"


def _chained(first: tuple[str, Tensor] | None, rest: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    if first is not None:
        yield first
    yield from rest


WeightTransferEngineFactory.register_engine(GLOO, GlooEngine)


class BroadcastWorker:
    """The `worker_extension_cls` of an engine that receives a weight broadcast."""

    weight_transfer_engine: GlooEngine

    def broadcast_problem(self) -> str:
        """Return the error of the last weight-transfer call; empty if it succeeded."""
        return self.weight_transfer_engine.problem


# Arguments of an engine for `BroadcastTransfer`.
BROADCAST_ARGS: dict[str, object] = {
    "weight_transfer_config": {"backend": GLOO},
    "worker_extension_cls": f"{BroadcastWorker.__module__}.{BroadcastWorker.__qualname__}",
}


class BroadcastTransfer:
    """Controls the receiving side of one engine, built with `BROADCAST_ARGS`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def connect(self, address: WeightBroadcastAddress) -> None:
        """Connect all workers of the engine to the sender.

        Raises:
            WeightTransferError: a worker cannot reach the sender.
        """
        self._llm.init_weight_transfer_engine({"init_info": asdict(address)})
        self._raise_problems()

    def receive(self, version: int) -> None:
        """Receive `version`.

        The KV cache of older weights is dropped. Running requests recompute theirs with the new weights.

        Raises:
            WeightTransferError: the errors of all workers, including the error of the sender.
        """
        self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"version": version}})
        problems = self._problems()
        self._llm.finish_weight_update(str(version) if not problems else None)
        if problems:
            raise WeightTransferError("\n".join(problems))

    def _problems(self) -> list[str]:
        """Return the errors of all workers without duplicates."""
        return list(dict.fromkeys(problem for problem in self._llm.collective_rpc("broadcast_problem") if problem))

    def _raise_problems(self) -> None:
        if problems := self._problems():
            raise WeightTransferError("\n".join(problems))
