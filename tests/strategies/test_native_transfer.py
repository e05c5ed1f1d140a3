"""vLLM's transfers between GPUs, several trainer ranks and engines: data, failures, and the forms of their messages."""

from __future__ import annotations

import json
import time

import pytest
import torch
from native_ranks import BUCKET, SHAPES, transfer, value
from ranks import Ranks

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.weight_broadcast_address import Backend

pytest.importorskip("vllm", reason="vllm is not installed")
from vllm.distributed.weight_transfer.base import ParamMeta

from roll_gspo.strategies.vllm.engine.ipc_handles import decode_handles, encode_handles
from roll_gspo.strategies.vllm.engine.native_sender import IPC_BUFFER_BYTES, buffer_size
from roll_gspo.strategies.vllm.engine.time_limit import within

pytestmark = [pytest.mark.vllm]


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_every_engine_gets_every_tensor_of_every_version(ranks: Ranks, backend: Backend) -> None:
    for rank, seen in enumerate(ranks.run(2, transfer, backend)):
        assert seen["error"] == "" and seen["engine_errors"] == []
        source = rank if backend == "ipc" else 0  # with IPC an engine reads the memory of the GPU that it is on
        for version, tensors in zip((1, 2), seen["received"], strict=True):
            assert [name for name, _ in tensors] == list(SHAPES)
            assert all(torch.equal(tensor, value(name, version, source)) for name, tensor in tensors)
        parts = seen["calls"].count("update") - 1  # one is the probe
        assert parts == (2 if backend == "nccl" else 2 * 3), "NCCL has one command per version, IPC one per buffer"
        assert [call for call in seen["calls"] if call != "update"] == ["finish None", "finish 1", "finish 2"]


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_failing_engine_is_named_and_no_rank_of_the_trainer_waits(ranks: Ranks, backend: Backend) -> None:
    first, second = ranks.run(2, transfer, backend, "layer.20")
    assert "version 1: rank 2 (" in first["error"] and "ValueError: no memory for layer.20" in first["error"]
    assert first["counts"][0] == second["counts"][0] == len(SHAPES), "the export is a collective of both"
    assert "no memory for layer.20" in second["engine_errors"][0]


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_incomplete_model_is_refused_before_any_weight_changes(ranks: Ranks, backend: Backend) -> None:
    first, second = ranks.run(2, transfer, backend, None, True)
    assert "1 missing: bias; the old weights were kept" in first["error"]
    assert first["counts"][0] == second["counts"][0] == len(SHAPES)
    assert first["calls"] == second["calls"] == ["update", "finish None"], "only the probe"


def test_buffer_holds_the_largest_tensor_but_not_more_than_the_model() -> None:
    small = [ParamMeta(f"w{index}", torch.bfloat16, (1000, 1000)) for index in range(3)]
    assert buffer_size(small, IPC_BUFFER_BYTES) == 6_000_000
    embedding = ParamMeta("model.embed_tokens.weight", torch.bfloat16, (152064, 3584))
    assert buffer_size([embedding, *small], 1 << 30) == 1_089_994_752
    many = [embedding, *small * 1000]
    assert buffer_size(many, IPC_BUFFER_BYTES) == IPC_BUFFER_BYTES
    assert buffer_size([], BUCKET) == 16384, "the probe"


def test_handles_survive_as_json() -> None:
    handle = (
        *(torch.Tensor, torch.Size([8]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0),
        *(b"\x00\xffhandle", 8, 64, False, b"counter", 0, b"event", True),
    )
    sent = json.loads(json.dumps(encode_handles({"GPU-1": handle})))
    assert decode_handles(sent) == {"GPU-1": handle}
    hash(decode_handles(sent)["GPU-1"])  # vLLM uses it as a key
    with pytest.raises(WeightTransferError, match="contains the class 'Popen'"):
        decode_handles({"GPU-1": [{"class": "Popen"}]})


def test_time_limit_of_a_call_without_one() -> None:
    assert within(5, "compute", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, "compute", lambda: 1 // 0)
    with pytest.raises(WeightTransferError, match=r"could not start NCCL within 0\.1 s"):
        within(0.1, "start NCCL", lambda: time.sleep(3))
