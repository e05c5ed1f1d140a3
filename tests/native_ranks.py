"""Two trainer ranks with one engine each, on GPUs made of gloo and of files; run by the fixture `ranks`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from file_gpus import install
from torch import Tensor
from torch import distributed as dist

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.weight_broadcast_address import Backend, WeightBroadcastAddress
from roll_gspo.strategies.weight_commands import CommandSender

SHAPES = {f"layer.{index}": (30 + index, 7) for index in range(40)} | {"large": (300, 40)}
BUCKET = 4096


def value(name: str, version: int, rank: int) -> Tensor:
    """Return a tensor as a trainer rank exports it; the copies of the ranks differ, to tell them apart."""
    index = list(SHAPES).index(name)
    return torch.full(SHAPES[name], float(1000 * version + 10 * index + rank)).bfloat16()


class Export:
    """Weights in one buffer that each tensor overwrites; the ranks need different times."""

    def __init__(self, version: int, rank: int) -> None:
        self.version, self.rank, self.count = version, rank, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(20000, dtype=torch.bfloat16)
        for name, shape in SHAPES.items():
            time.sleep(0.002 * self.rank)
            self.count += 1
            yield name, buffer[: torch.Size(shape).numel()].view(shape).copy_(value(name, self.version, self.rank))
            buffer.fill_(float("nan"))


class Loader:
    """A `ModelLoader` that keeps references to what it loads, as layer by layer loading does."""

    fails_at: str | None = None
    half_loaded = False

    def __init__(self, model: object, config: object) -> None:
        self.loaded: list[tuple[str, Tensor]] = []

    def begin(self) -> None:
        self.loaded.clear()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == self.fails_at:
                raise ValueError(f"no memory for {name}")
            self.loaded.append((name, tensor))

    def finish(self) -> None: ...


class Llm:
    """The weight-transfer calls of vLLM's `LLM`, with one worker in this process."""

    model_config = None

    def __init__(self) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig

        from roll_gspo.strategies.vllm.engine.receiving_engine import ReceivingEngine

        parallel = SimpleNamespace(rank=0, world_size=1, data_parallel_index=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.engine = ReceivingEngine(WeightTransferConfig(), config, torch.device("cpu"), torch.nn.Module())
        self.calls: list[str] = []

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.engine.init_transfer_engine(self.engine.parse_init_info(request["init_info"]))

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls.append("update")
        self.engine.update_weights(request["update_info"])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(f"finish {weight_version}")
        self.engine.finish_weight_update()

    def collective_rpc(self, name: str) -> list[str]:
        return [self.engine.problem]

    def reset_prefix_cache(self, reset_running_requests: bool) -> None: ...


def _in_thread(work: Callable[[], None], errors: list[str]) -> threading.Thread:
    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def transfer(backend: Backend, fails_at: str | None = None, missing: bool = False) -> dict[str, Any]:
    """Send two versions (one if it fails) by every rank to every engine; return what this rank and its engine saw.

    Args:
        backend: transport.
        fails_at: tensor that the second engine cannot load.
        missing: the engines expect a tensor that the trainer does not have.
    """
    from roll_gspo.strategies.vllm.engine import broadcast_transfer, native_sender, receiving_engine

    rank = dist.get_rank()
    expected = SHAPES | ({"bias": (3,)} if missing else {})
    versions = (1,) if missing or fails_at else (1, 2)
    with pytest.MonkeyPatch.context() as patches:
        install(patches.setattr, gpu=rank)
        patches.setattr(receiving_engine, "ModelLoader", Loader)
        patches.setattr(broadcast_transfer, "shapes_of_full_model", lambda config: expected)
        patches.setattr(Loader, "fails_at", fails_at if rank == 1 else None)
        wanted = WeightBroadcastAddress("127.0.0.1", 0, 3, timeout_s=60.0, backend=backend, num_trainers=2)
        commands = CommandSender(wanted) if rank == 0 else None
        shared = [commands.address if commands else None]
        dist.broadcast_object_list(shared)
        address = shared[0]
        assert address is not None
        llm, received, engine_errors = Llm(), [], []
        control: Any = llm
        engine = broadcast_transfer.BroadcastTransfer(control)

        def serve() -> None:
            engine.connect(address.at(1 + rank))
            for version in versions:
                engine.receive(version)
                loader = llm.engine._loader
                assert isinstance(loader, Loader)
                received.append([(name, tensor.clone()) for name, tensor in loader.loaded])

        thread = _in_thread(serve, engine_errors)
        sender = native_sender.NativeSender(address, BUCKET, commands)
        sender.start(Export(0, rank))
        error, counts = "", []
        try:
            for version in versions:
                export = Export(version, rank)
                counts.append(export)
                sender.send(export, version)
        except WeightTransferError as caught:
            error = str(caught)
        dist.barrier()  # rank 0 waits for both engines, another rank may be ahead of its engine
        thread.join(2)  # an engine in a broadcast without a sender never returns
        return {
            "received": received,
            "error": error,
            "engine_errors": engine_errors,
            "counts": [export.count for export in counts],
            "calls": llm.calls,
        }
