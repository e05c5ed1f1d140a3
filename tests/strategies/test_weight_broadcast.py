"""Weight broadcast between processes: every byte arrives, and every failure reaches the other side in time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from broadcast_processes import Packed, Process, ProcessError, Worker, packed
from engine_cases import Checkpoints, model_setup, sequences
from tiny_models import build_model
from torch import Tensor
from torch import distributed as dist

import roll_gspo.strategies.weight_broadcast as broadcast_module
from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer
from roll_gspo.strategies.hf.model import HfWeights
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver, WeightBroadcastSender
from roll_gspo.strategies.weight_broadcast_format import Buffers, pieces
from roll_gspo.strategies.weight_update import ADAPTER

BUCKET = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64)


def tensors(seed: int) -> list[tuple[str, Tensor]]:
    """Return tensors of all dtypes: small, larger than a bucket, with rows larger than one, strided, empty, scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (0, 4), (700,), (2, 600), (40, 9, 3), (1,)]
    made = []
    for index, shape in enumerate(shapes):
        for dtype in DTYPES:
            values = 10 * torch.randn(shape, generator=generator)
            made.append((f"{index}.{dtype}", values.to(dtype)))
    strided = torch.randn(50, 60, generator=generator)
    return [*made, ("transposed", strided.T), ("every second", strided[:, ::2]), ("mask", strided > 0)]


def small(seed: int, count: int = 20) -> list[tuple[str, Tensor]]:
    """Several buckets of them."""
    return [(f"w{index}", torch.full((100,), float(seed + index))) for index in range(count)]


@pytest.fixture(scope="module")
def receivers() -> Iterator[list[Process]]:
    """Two receiver processes; each test connects them to a new sender."""
    processes = [Process(), Process()]
    yield processes
    for process in processes:
        process.close()


def connected(receivers: list[Process], timeout_s: float = 30.0) -> WeightBroadcastSender:
    sender = WeightBroadcastSender(
        WeightBroadcastAddress("127.0.0.1", 0, 1 + len(receivers), timeout_s=timeout_s), BUCKET
    )
    for rank, process in enumerate(receivers, start=1):
        process.call(Worker.connect, sender.address, rank)
    return sender


def started(receivers: list[Process], version: int) -> None:
    for process in receivers:
        process.start(Worker.receive, version)


@pytest.mark.parametrize("checksum", [False, True])
def test_every_tensor_of_several_versions_arrives_unchanged(receivers: list[Process], checksum: bool) -> None:
    had_group = dist.is_initialized()
    sender = connected(receivers)
    for version in (1, 2, 5):
        sent = tensors(version)
        started(receivers, version)
        sender.send(sent, version, checksum)
        for process in receivers:
            assert process.result() == packed(sent)
    assert dist.is_initialized() is had_group
    sender.close()


def test_checksum_detects_changed_bytes(receivers: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    sender = connected(receivers)
    with monkeypatch.context() as patch:
        patch.setattr(broadcast_module, "crc32", _flipping(2))
        started(receivers, 1)
        with pytest.raises(WeightTransferError, match=r"rank \d .*checksums differ.* w4, w5"):
            sender.send(small(1), 1, checksum=True)
    for rank, process in enumerate(receivers, start=1):
        with pytest.raises(ProcessError, match=rf"rank {rank} .* w4, w5"):
            process.result()
    _assert_works(sender, receivers, 2)


def _flipping(bucket: int) -> Callable[[Tensor], int]:
    original, calls = broadcast_module.crc32, iter(range(1000))
    return lambda tensor: original(tensor) ^ int(next(calls) == bucket)


def _assert_works(sender: WeightBroadcastSender, receivers: list[Process], version: int) -> None:
    started(receivers, version)
    sender.send(small(version), version)
    assert [process.result() for process in receivers] == 2 * [packed(small(version))]
    sender.close()


def test_member_that_never_connected_is_named_on_both_sides(receivers: list[Process]) -> None:
    sender = WeightBroadcastSender(WeightBroadcastAddress("127.0.0.1", 0, 3, timeout_s=1.0))
    receivers[0].call(Worker.connect, sender.address, 1)
    receivers[0].start(Worker.receive, 1)
    with pytest.raises(WeightTransferError, match=r"version 1: waited 1 s for rank 2 \(never connected\)"):
        sender.send(small(1), 1)
    with pytest.raises(ProcessError, match=r"waited 1 s for rank 2 \(never connected\)"):
        receivers[0].result()
    sender.close()


def test_late_receiver_is_named_and_can_join_the_next_version(receivers: list[Process]) -> None:
    sender = connected(receivers, timeout_s=1.0)
    receivers[1].start(Worker.receive, 1)
    late = rf"waited 1 s for rank 1 \(engine, process {receivers[0].process.pid} on "
    with pytest.raises(WeightTransferError, match=late):
        sender.send(small(1), 1)
    for process in receivers:
        if process is receivers[0]:
            process.start(Worker.receive, 1)
        with pytest.raises(ProcessError, match=late):
            process.result()
    _assert_works(sender, receivers, 2)


@pytest.mark.parametrize(
    ("method", "after", "message"),
    [
        (Worker.fail_in, 0, "ValueError: cannot load w0"),
        (Worker.fail_in, 7, "ValueError: cannot load w7"),
        (Worker.stop_in, 5, "stopped before its end"),
    ],
)
def test_failing_receiver_stops_all_members_but_the_source_is_exhausted(
    receivers: list[Process], method: object, after: int, message: str
) -> None:
    sender = connected(receivers, timeout_s=60.0)
    iterated: list[str] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in small(1):
            iterated.append(name)
            yield name, tensor

    receivers[0].start(method, 1, after)  # type: ignore[arg-type]
    receivers[1].start(Worker.receive, 1)
    begin = time.perf_counter()
    with pytest.raises(WeightTransferError, match=rf"rank 1 \(engine, process .*{message}"):
        sender.send(source(), 1)
    with pytest.raises(ProcessError, match=message):
        receivers[0].result()
    with pytest.raises(ProcessError, match=rf"rank 1 \(engine, process .*{message}"):
        receivers[1].result()
    assert time.perf_counter() - begin < 10
    assert iterated == [name for name, _ in small(1)]
    _assert_works(sender, receivers, 2)


def test_receiver_that_fails_on_the_last_tensor_fails_the_sender(receivers: list[Process]) -> None:
    sender = connected(receivers)
    receivers[0].start(Worker.fail_in, 1, 19)
    receivers[1].start(Worker.receive, 1)
    with pytest.raises(WeightTransferError, match=r"rank 1 .*cannot load w19"):
        sender.send(small(1), 1)
    with pytest.raises(ProcessError, match="cannot load w19"):
        receivers[0].result()
    assert receivers[1].result() == packed(small(1))
    _assert_works(sender, receivers, 2)


def test_error_of_the_source_reaches_the_receivers(receivers: list[Process]) -> None:
    sender = connected(receivers, timeout_s=60.0)

    def source() -> Iterator[tuple[str, Tensor]]:
        yield from small(1)[:15]
        raise RuntimeError("the trainer lost a rank")

    started(receivers, 1)
    with pytest.raises(WeightTransferError, match="version 1: RuntimeError: the trainer lost a rank"):
        sender.send(source(), 1)
    for process in receivers:
        with pytest.raises(ProcessError, match="version 1: RuntimeError: the trainer lost a rank"):
            process.result()
    _assert_works(sender, receivers, 2)


def test_unexpected_version_is_rejected(receivers: list[Process]) -> None:
    sender = connected(receivers)
    receivers[0].start(Worker.receive, 7)
    receivers[1].start(Worker.receive, 8)
    with pytest.raises(WeightTransferError, match=r"version 7: rank 2 .* waits for version 8"):
        sender.send(small(1), 7)
    for process in receivers:
        with pytest.raises(ProcessError, match=r"version 7: rank 2 .* waits for version 8"):
            process.result()
    _assert_works(sender, receivers, 9)


def test_update_of_another_kind_is_refused_and_the_next_one_arrives(receivers: list[Process]) -> None:
    sender = connected(receivers)
    for kind, message in (
        (ADAPTER, "the trainer sends LoRA adapters .*, but the engine was built for all weights of the model"),
        ("delta", "updates of kind 'delta' are unknown to this engine, which takes 'full'"),
    ):
        for process in receivers:
            process.start(Worker.receive, 1)
        with pytest.raises(WeightTransferError, match=message):
            sender.send(small(1), 1, kind=kind)
        for process in receivers:
            with pytest.raises(ProcessError, match=message):
                process.result()
    for process in receivers:
        process.start(Worker.receive, 2)
    sender.send(small(2), 2)
    assert [process.result() for process in receivers] == [packed(small(2))] * 2


def test_dead_receiver_does_not_block_the_others() -> None:
    processes = [Process(), Process()]
    try:
        sender = connected(processes, timeout_s=3.0)
        processes[0].start(Worker.die_in, 1, 7)
        processes[1].start(Worker.receive, 1)
        begin = time.perf_counter()
        with pytest.raises(WeightTransferError, match=r"rank 1|could not broadcast"):
            sender.send(small(1), 1)
        with pytest.raises(ProcessError, match="WeightTransferError"):
            processes[1].result()
        assert time.perf_counter() - begin < 15
        sender.close()
    finally:
        for process in processes:
            process.close()


def test_dead_sender_does_not_block_the_receivers(receivers: list[Process]) -> None:
    dying = Process()
    try:
        address = dying.call(Worker.open_sender, 3, 60.0)
        for rank, process in enumerate(receivers, start=1):
            process.call(Worker.connect, address, rank)
        started(receivers, 1)
        dying.start(Worker.send_and_die, 1)
        for process in receivers:
            with pytest.raises(ProcessError, match=r"lost the sender|could not broadcast"):
                process.result(timeout_s=20)
            process.start(Worker.receive, 2)
            with pytest.raises(ProcessError, match="connect again"):
                process.result(timeout_s=20)
    finally:
        dying.close()


def test_sender_holds_one_tensor_of_its_source_at_a_time(receivers: list[Process]) -> None:
    sender = connected(receivers)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for index in range(12):
            alive.append(sum(ref() is not None for ref in made))
            tensor = torch.full((500 if index % 3 == 2 else 100,), float(index))
            made.append(weakref.ref(tensor))
            yield f"w{index}", tensor
            del tensor

    started(receivers, 1)
    sender.send(source(), 1)
    arrived: list[Packed] = [process.result() for process in receivers]  # type: ignore[misc]
    assert [len(weights) for weights in arrived] == [12, 12]
    assert max(alive) == 0
    sender.close()


def test_broadcasts_are_independent_and_close(receivers: list[Process]) -> None:
    first, second = connected(receivers[:1]), connected(receivers[1:])
    for version in (1, 2):
        for sender, process in ((first, receivers[0]), (second, receivers[1])):
            process.start(Worker.receive, version)
            sender.send(small(version), version)
            assert process.result() == packed(small(version))
    address = first.address
    first.close()
    first.close()
    with pytest.raises(WeightTransferError, match="closed"):
        first.send(small(3), 3)
    WeightBroadcastSender(address).close()  # the port is free again
    second.close()


def test_port_in_use_and_missing_sender_are_named() -> None:
    sender = WeightBroadcastSender(WeightBroadcastAddress("127.0.0.1", 0, 2, timeout_s=1.0))
    with pytest.raises(WeightTransferError, match=rf"could not open the store at 127.0.0.1:{sender.address.port}"):
        WeightBroadcastSender(sender.address)
    sender.close()
    with pytest.raises(WeightTransferError, match=r"rank 1 could not reach the sender's store .* within 1 s"):
        WeightBroadcastReceiver(sender.address)
    with pytest.raises(ValueError, match=r"rank 2 is not in 1\.\.1"):
        WeightBroadcastReceiver(sender.address, rank=2)


def test_pieces_cover_a_tensor_within_the_limit() -> None:
    for shape in [(7,), (1000,), (3, 400), (5, 2, 300), (300, 2)]:
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        cut = list(pieces(tensor, 256))
        assert max(piece.nbytes for piece in cut) <= 256
        assert torch.equal(torch.cat([piece.reshape(-1) for piece in cut]), tensor.reshape(-1))
    assert not list(pieces(torch.empty(0, 3), 256))


def test_buffers_are_reused_only_without_references() -> None:
    buffers = Buffers()
    first = buffers.take(64)
    place, part = first.data_ptr(), first[8:16].view(torch.float32)
    del first
    second = buffers.take(64)
    assert second.data_ptr() != place
    del part
    assert buffers.take(64).data_ptr() == place


def test_hf_infer_receives_weights_by_broadcast(checkpoint: Checkpoints, receivers: list[Process]) -> None:
    engine = HfInfer(model_setup(checkpoint("qwen3_moe")), HfConfig())
    with pytest.raises(WeightTransferError, match="not connected"):
        engine.receive(1)
    address: WeightBroadcastAddress = receivers[0].call(Worker.open_sender, 2, 20.0)  # type: ignore[assignment]
    engine.connect(address)
    batch = sequences()
    scores = []
    for version in (1, 2):
        receivers[0].start(Worker.send_model, "qwen3_moe", version, version)
        engine.receive(version)
        receivers[0].result()
        expected = HfInfer(model_setup(checkpoint("qwen3_moe")), HfConfig())
        expected.update_weights(HfWeights(build_model("qwen3_moe", seed=version)), version)
        scores.append(engine.score(batch).log_probs)
        assert torch.equal(scores[-1], expected.score(batch).log_probs)
        assert engine.weights_version == version
    assert not torch.equal(scores[0], scores[1])
    receivers[0].start(Worker.send_model, "qwen3_tied", 1, 3)
    with pytest.raises(WeightTransferError, match="hf_infer: "):
        engine.receive(3)
    with pytest.raises(ProcessError, match=r"rank 1 \(hf_infer, process .*hf_infer: "):
        receivers[0].result()
    with pytest.raises(WeightTransferError, match="version 3 failed half-way"):
        engine.score(batch)
    receivers[0].start(Worker.send_model, "qwen3_moe", 1, 4)
    engine.receive(4)
    receivers[0].result()
    assert torch.equal(engine.score(batch).log_probs, scores[0])
    engine.shutdown()


def test_hf_infer_can_connect_to_another_sender(checkpoint: Checkpoints, receivers: list[Process]) -> None:
    engine = HfInfer(model_setup(checkpoint("qwen2")), HfConfig())
    for process in receivers:
        address: WeightBroadcastAddress = process.call(Worker.open_sender, 2, 20.0)  # type: ignore[assignment]
        engine.connect(address)
        process.start(Worker.send_model, "qwen2", 3, 1)
        engine.receive(1)
        process.result()
    engine.shutdown()
