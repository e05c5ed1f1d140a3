"""vLLM engines in separate processes that receive their weights from the test process."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from broadcast_processes import Process, ProcessError, Worker
from file_gpus import install
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from roll_gspo.batch import Completion
from roll_gspo.errors import ConfigError, WeightTransferError
from roll_gspo.strategies.base import ModelSetup
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastSender
from roll_gspo.strategies.weight_broadcast_address import Backend
from roll_gspo.strategies.weight_commands import CommandSender

pytest.importorskip("vllm", reason="vllm is not installed")
from roll_gspo.strategies.vllm.engine.native_sender import NativeSender

pytestmark = [pytest.mark.vllm]

PROMPTS = [[3, 5 + i, 9, 40 + i, 7] for i in range(4)] + [[3 + (i * 7) % 50 for i in range(150)]]
TOLERANCE = {"qwen3_tied": 1e-4, "llama": 1e-4, "qwen3_moe": 1e-3}
SMALL_BUCKETS = 8192  # bytes: every model has many, and tensors that are cut


def save_model(family: str, folder: Path) -> Path:
    """A checkpoint with heads that vLLM's CPU attention has kernels for."""
    model_class, config = FAMILIES[family]
    config = copy.deepcopy(config)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    model_class(config).save_pretrained(folder)
    return folder


def weights(folder: Path, seed: int) -> dict[str, Tensor]:
    """Random weights under the names of the checkpoint, wide enough for peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, old in load_file(folder / "model.safetensors").items():
        noise = torch.randn(old.shape, generator=generator)
        drawn[name] = 1 + 0.1 * noise if name.endswith("norm.weight") else 0.2 * noise
    return drawn


@torch.no_grad()
def log_prob_error(folder: Path, new: dict[str, Tensor], groups: list[list[Completion]], copy_to: Path) -> float:
    """Largest difference of the responses' log-probs from those of transformers with the weights `new`."""
    shutil.copytree(folder, copy_to, dirs_exist_ok=True)
    save_file(new, copy_to / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(copy_to, dtype=torch.float32).eval()
    worst = 0.0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            response = torch.tensor(completion.token_ids)
            logits = model(torch.cat([torch.tensor(prompt), response])[None]).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, response[:, None])[:, 0]
            worst = max(worst, float((expected - torch.tensor(completion.log_probs)).abs().max()))
    return worst


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()


Connect = Callable[[str, int], tuple[Path, WeightBroadcastSender]]


@pytest.fixture
def connect(process: Process, tmp_path: Path) -> Iterator[Connect]:
    """Build an engine in the process and connect it; afterwards nothing of it is left."""
    senders: list[WeightBroadcastSender] = []

    def build(family: str, tensor_parallel_size: int) -> tuple[Path, WeightBroadcastSender]:
        folder = save_model(family, tmp_path / family)
        process.call(Worker.build_engine, folder, tensor_parallel_size)
        address = WeightBroadcastAddress("127.0.0.1", 0, 1 + tensor_parallel_size, timeout_s=30.0)
        senders.append(WeightBroadcastSender(address, SMALL_BUCKETS))
        process.call(Worker.connect_engine, senders[0].address)
        return folder, senders[0]

    yield build
    assert process.call(Worker.shutdown_engine) == 0
    senders[0].close()


@pytest.fixture
def gpus(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides have GPUs made of gloo and of files."""
    process.call(Worker.pretend_gpus)
    install(monkeypatch.setattr)


class Trainer:
    """The only rank of a trainer whose tensors share memory, as those of an export do."""

    def __init__(self, process: Process, folder: Path, backend: Backend, timeout_s: float = 30.0) -> None:
        address = WeightBroadcastAddress("127.0.0.1", 0, 2, timeout_s=timeout_s, backend=backend)
        self.commands = CommandSender(address)
        self.sender = NativeSender(self.commands.address, SMALL_BUCKETS, self.commands)
        process.start(Worker.connect_engine, self.commands.address)
        self.sender.start(overwritten(weights(folder, 0)))
        process.result()

    def send(self, process: Process, tensors: dict[str, Tensor], version: int) -> None:
        process.start(Worker.receive_engine, version)
        self.sender.send(overwritten(tensors), version)
        process.result()


def overwritten(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield views of one buffer, which the next tensor overwrites."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        view = buffer[: tensor.numel()].view(tensor.shape)
        yield name, view.copy_(tensor)
        buffer.fill_(float("nan"))


@pytest.mark.parametrize(("backend", "family"), [("nccl", "qwen3_tied"), ("ipc", "qwen3_moe")])
def test_vllms_transfers_between_gpus_deliver_each_version(
    process: Process, gpus: None, tmp_path: Path, backend: Backend, family: str
) -> None:
    folder = save_model(family, tmp_path / family)
    process.call(Worker.build_engine, folder, 1)
    trainer = Trainer(process, folder, backend)
    with pytest.raises(ProcessError, match="no weights were transferred yet; call receive first"):
        generate(process)
    for version in (1, 2):
        new = weights(folder, version)
        trainer.send(process, new, version)
        assert log_prob_error(folder, new, generate(process), tmp_path / "copy") < TOLERANCE[family]
    trainer.sender.close()
    assert process.call(Worker.shutdown_engine) == 0


def transfer(process: Process, sender: WeightBroadcastSender, source: dict[str, Tensor], version: int) -> None:
    process.start(Worker.receive_engine, version)
    sender.send(source.items(), version, checksum=True)
    process.result()


def generate(process: Process) -> list[list[Completion]]:
    return process.call(Worker.generate, PROMPTS, 2, 8)  # type: ignore[return-value]


def check_versions(process: Process, connect: Connect, tmp_path: Path, family: str, tensor_parallel_size: int) -> None:
    folder, sender = connect(family, tensor_parallel_size)
    with pytest.raises(ProcessError, match="no weights were transferred yet; call receive first"):
        generate(process)
    with pytest.raises(ProcessError, match="call receive"):
        process.call(Worker.update_engine)
    seen = []
    for version in (1, 2):
        new = weights(folder, version)
        transfer(process, sender, new, version)
        groups = generate(process)
        assert log_prob_error(folder, new, groups, tmp_path / "copy") < TOLERANCE[family]
        seen.append(groups)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("family", ["qwen3_tied", "llama", "qwen3_moe"])
def test_engine_in_another_process_computes_with_each_version(
    process: Process, connect: Connect, tmp_path: Path, family: str
) -> None:
    check_versions(process, connect, tmp_path, family, 1)


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe"])
def test_engine_of_two_workers_computes_with_each_version(
    process: Process, connect: Connect, tmp_path: Path, family: str
) -> None:
    check_versions(process, connect, tmp_path, family, 2)


def check_failures(process: Process, connect: Connect, tmp_path: Path, tensor_parallel_size: int) -> None:
    folder, sender = connect("qwen3_tied", tensor_parallel_size)
    strange = {"unknown": torch.ones(3), **weights(folder, 1)}
    with pytest.raises(
        WeightTransferError, match=r"vllm worker \d, .*1 unexpected: unknown; the old weights were kept"
    ):
        transfer(process, sender, strange, 1)
    with pytest.raises(ProcessError, match="1 unexpected: unknown; the old weights were kept"):
        process.result()
    with pytest.raises(ProcessError, match="version 1 failed; call receive first"):
        generate(process)
    new = weights(folder, 2)
    transfer(process, sender, new, 2)
    assert log_prob_error(folder, new, generate(process), tmp_path / "copy") < 1e-4

    def source() -> Iterator[tuple[str, Tensor]]:
        yield from list(new.items())[:-3]
        raise RuntimeError("the trainer lost a rank")

    process.start(Worker.receive_engine, 3)
    with pytest.raises(WeightTransferError, match="the trainer lost a rank"):
        sender.send(source(), 3)
    with pytest.raises(ProcessError, match="version 3: RuntimeError: the trainer lost a rank"):
        process.result()
    with pytest.raises(WeightTransferError, match="build a new engine"):
        transfer(process, sender, new, 4)
    with pytest.raises(ProcessError, match="build a new engine"):
        process.result()
    with pytest.raises(ProcessError, match="version 4 failed"):
        generate(process)


def test_engine_refuses_to_generate_after_a_failed_transfer(process: Process, connect: Connect, tmp_path: Path) -> None:
    check_failures(process, connect, tmp_path, 1)


@pytest.mark.long
def test_engine_of_two_workers_refuses_to_generate_after_a_failed_transfer(
    process: Process, connect: Connect, tmp_path: Path
) -> None:
    check_failures(process, connect, tmp_path, 2)


def test_engines_that_cannot_receive_a_broadcast_are_config_errors(tmp_path: Path) -> None:
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    setup = ModelSetup(save_model("qwen3_moe", tmp_path), torch.float32, 1, 1.0, 0)
    two = VllmConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 2 .* trainer's process"):
        VllmGenerate(setup, two, 256)
    with pytest.raises(ConfigError, match="experts cannot be recorded"):
        VllmGenerate(setup, two, 256, record_routed_experts=True, receives_broadcast=True)


def test_incomplete_weights_are_rejected_after_the_last_bucket(process: Process, connect: Connect) -> None:
    folder, sender = connect("llama", 1)
    new = weights(folder, 1)
    del new["model.norm.weight"]
    with pytest.raises(WeightTransferError, match=r"1 missing: model\.norm\.weight; build a new engine"):
        transfer(process, sender, new, 1)
    with pytest.raises(ProcessError, match=r"1 missing: model\.norm\.weight"):
        process.result()
