"""Memory that is overwritten behind yielded tensors does not change what vLLM's transfers deliver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import Checkpoints
from ranks import Ranks
from torch import Tensor
from weight_cases import held

from roll_gspo.strategies.base import WeightSource
from roll_gspo.strategies.kept_weights import KeptWeights

WEIGHTS = {
    "embedding": torch.arange(12.0).view(3, 4),
    "norm": torch.full((4,), 7.0, dtype=torch.bfloat16),
    "projection": torch.arange(12.0, 24.0).view(4, 3).t(),
    "head": torch.arange(24.0, 36.0).view(3, 4),
}


class ReusedMemory:
    """A `WeightSource` that yields every tensor in the same memory, as an export of split parameters does."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        memory = torch.zeros(64, dtype=torch.uint8)
        for name, weight in WEIGHTS.items():
            room = memory[: weight.nbytes].view(weight.dtype)
            # a transposed tensor is a transposed view of contiguous memory
            view = room.view(weight.shape) if weight.is_contiguous() else room.view(weight.t().shape).t()
            yield name, view.copy_(weight)


def packed(source: WeightSource, buffer_bytes: int) -> dict[str, Tensor]:
    """Return what a receiver unpacks from the chunks of vLLM's NCCL transfer."""
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

    received: dict[str, Tensor] = {}
    stream = iter(source)
    while chunk := pack_tensors(stream, lambda item: item[1], buffer_bytes):
        received |= unpack_tensor(chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes)
    return received


class Receiver:
    """The inference side of vLLM's IPC transfer in this process: opens the handles of the update call."""

    def __init__(self) -> None:
        self.received: dict[str, Tensor] = {}

    def update_weights(self, info: dict[str, Any]) -> None:
        from torch.multiprocessing.reductions import rebuild_tensor

        for name, handles in zip(info["names"], info["ipc_handles"], strict=True):
            self.received[name] = rebuild_tensor(*handles["this GPU"])


def through_ipc(source: WeightSource) -> dict[str, Tensor]:
    """Return what a receiver opens in vLLM's unpacked IPC transfer, with handles of host memory."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine as Engine

    engine: Any = Engine.__new__(Engine)  # its constructor asks a GPU for its number
    engine.client, engine.is_sender, engine.gpu_uuid = Receiver(), True, "this GPU"
    references = engine._send_unpacked(source)
    assert len(references) == len(WEIGHTS)
    return engine.client.received


def wrong(received: dict[str, Tensor]) -> list[str]:
    assert received.keys() == WEIGHTS.keys()
    return [name for name, weight in WEIGHTS.items() if not torch.equal(received[name], weight)]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
@pytest.mark.parametrize("buffer_bytes", [1, 100, 1000])
def test_packing_delivers_every_tensor(buffer_bytes: int) -> None:
    assert wrong(packed(KeptWeights(ReusedMemory()), buffer_bytes)) == []


@pytest.mark.vllm
def test_unpacked_ipc_delivers_every_tensor() -> None:
    assert wrong(through_ipc(KeptWeights(ReusedMemory()))) == []


@pytest.mark.vllm
def test_vllm_delivers_overwritten_memory_without_copies() -> None:
    """If this fails, vLLM copies by itself and `KeptWeights` is not needed any more."""
    assert "embedding" in wrong(packed(ReusedMemory(), 1000))
    assert "embedding" in wrong(through_ipc(ReusedMemory()))


def test_copies_are_contiguous_and_without_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    ((name, copy),) = KeptWeights([("weight", parameter.t())])
    assert name == "weight" and copy.is_contiguous() and not copy.requires_grad and copy.shape == (3, 2)


@pytest.mark.megatron
def test_export_of_split_parameters_can_be_kept(checkpoint: Checkpoints, ranks: Ranks) -> None:
    kept, overwritten = zip(*ranks.run(2, held, checkpoint("qwen3_untied")), strict=True)
    assert kept == ([], []) and all("model.embed_tokens.weight" in names for names in overwritten)
