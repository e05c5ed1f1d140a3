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
from roll_gspo.strategies.vllm.loading import load_full_model, shapes_of_full_model
from roll_gspo.strategies.vllm.manifest import differences
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


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Which version the sender is about to send."""

    version: int


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: a receiver on the wire that loads the model layer by layer while the buckets arrive."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _receiver: WeightBroadcastReceiver | None = None
    _half_loaded = False
    problem = ""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Connect to the sender; another wire is left for this one."""
        self._noted(lambda: self._connect(WeightBroadcastAddress(**asdict(init_info))))

    def _connect(self, address: WeightBroadcastAddress) -> None:
        self.shutdown()
        self._expected = shapes_of_full_model(self.model_config)
        worker = self.parallel_config.rank
        self._receiver = WeightBroadcastReceiver(address, address.first_rank + worker, f"vllm worker {worker}")

    def start_weight_update(self) -> None:
        """Nothing yet: the old weights stay usable until the first manifest is accepted."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load the whole model."""
        self._noted(lambda: self._receive(update_info.version))

    def _receive(self, version: int) -> None:
        if self._receiver is None:
            raise WeightTransferError("weight transfer: the engine is not connected; call connect first")
        arrived: list[tuple[str, tuple[int, ...], torch.dtype]] = []

        def accept(metas: Sequence[TensorMeta], last: bool) -> None:
            arrived.extend((meta.name, meta.shape, meta.torch_dtype) for meta in metas)
            seen = {name for name, _, _ in arrived}
            expected = self._expected if last else {n: s for n, s in self._expected.items() if n in seen}
            if wrong := differences(expected, arrived):
                raise WeightTransferError("weight transfer: " + "; ".join(wrong) + self._after_refusal())

        with self._receiver.receive(version, accept) as weights:
            if self._half_loaded:
                raise WeightTransferError("weight transfer: an earlier one broke off half-way; build a new engine")
            first = next(weights, None)  # only now there is something to replace the old weights with
            self._half_loaded = True
            load_full_model(self.model, self.model_config, _chained(first, weights))
            self._half_loaded = False

    def _after_refusal(self) -> str:
        return "; build a new engine" if self._half_loaded else "; the old weights were kept"

    def finish_weight_update(self) -> None:
        """Nothing left: `receive_weights` saw the whole model."""

    def shutdown(self) -> None:
        """Leave the wire."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _noted(self, work: Callable[[], None]) -> None:
        self.problem = ""
        try:
            work()
        except Exception as error:
            named = isinstance(error, WeightTransferError)
            self.problem = str(error) if named else f"weight transfer: {type(error).__name__}: {error}"


def _chained(first: tuple[str, Tensor] | None, rest: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    if first is not None:
        yield first
    yield from rest


WeightTransferEngineFactory.register_engine(GLOO, GlooEngine)


class BroadcastWorker:
    """`worker_extension_cls` of an engine that receives over a wire."""

    weight_transfer_engine: GlooEngine

    def broadcast_problem(self) -> str:
        """What went wrong in the last call of the weight transfer; empty if nothing did."""
        return self.weight_transfer_engine.problem


# Of an engine that `BroadcastTransfer` drives.
BROADCAST_ARGS: dict[str, object] = {
    "weight_transfer_config": {"backend": GLOO},
    "worker_extension_cls": f"{BroadcastWorker.__module__}.{BroadcastWorker.__qualname__}",
}


class BroadcastTransfer:
    """Drives the receiving side of one engine, which was built with `BROADCAST_ARGS`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def connect(self, address: WeightBroadcastAddress) -> None:
        """All workers of the engine enter the wire.

        Raises:
            WeightTransferError: a worker does not reach the sender.
        """
        self._llm.init_weight_transfer_engine({"init_info": asdict(address)})
        self._raise_problems()

    def receive(self, version: int) -> None:
        """Take the version that the sender is sending; keys and values of older weights are forgotten.

        Raises:
            WeightTransferError: what went wrong in the workers, the sender's error included.
        """
        if not self._llm.reset_prefix_cache():
            raise WeightTransferError("weight transfer: requests are running; finish or abort them first")
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"version": version}})
        problems = self._problems()
        self._llm.finish_weight_update(str(version) if not problems else None)
        if problems:
            raise WeightTransferError("\n".join(problems))

    def _problems(self) -> list[str]:
        """Of all workers; one that several report is listed once."""
        return list(dict.fromkeys(problem for problem in self._llm.collective_rpc("broadcast_problem") if problem))

    def _raise_problems(self) -> None:
        if problems := self._problems():
            raise WeightTransferError("\n".join(problems))
