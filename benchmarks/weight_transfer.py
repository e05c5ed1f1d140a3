"""Time the transfer of weights to an engine in another process against a copy in this process.

    python benchmarks/weight_transfer.py [--rounds 9] [--sizes 0.6 20 300] [--checksum] [--backends gloo nccl ipc]

Sizes are million parameters of a tied dense Qwen3 with random weights in float32. Each round times three things: a copy
(`tensor.copy_`) of every tensor into an existing one, the broadcast to a receiver that drops the tensors, and the
broadcast into a running vLLM engine, which repacks them for its kernels. `--largest-engine 20` skips larger engines:
the largest needs several GB of memory for trainer, copies and engine.

`nccl` and `ipc` need GPUs and are only timed into an engine. The trainer is on the first GPU. The engine is on the
second one for `nccl`, and shares the first one for `ipc` and `gloo`. Backends without enough GPUs are skipped, and the
script says so. With GPUs the weights are bf16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

# Set before torch is imported: a spinning thread takes the core from the other process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from roll_gspo.strategies.base import NativeWeightSender
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.weight_broadcast import WeightBroadcastReceiver, WeightBroadcastSender
from roll_gspo.strategies.weight_broadcast_address import Backend, WeightBroadcastAddress
from roll_gspo.strategies.weight_commands import CommandSender
from roll_gspo.strategies.weight_update import ADAPTER, FULL_MODEL

TIMEOUT_S = 120.0
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
GPUS_NEEDED = {"gloo": 0, "ipc": 1, "nccl": 2}


class Shape(NamedTuple):
    """Sizes of a model."""

    hidden: int
    layers: int
    vocabulary: int


SHAPES = {0.6: Shape(128, 3, 256), 20.0: Shape(512, 5, 4096), 300.0: Shape(1280, 12, 32768)}


class Cost(NamedTuple):
    """Bytes of a model, and the seconds of each round."""

    nbytes: int
    copy: list[float]
    broadcast: list[float]
    engine: list[float]


def model_of(shape: Shape) -> Qwen3ForCausalLM:
    """Make a Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def serve(pipe: Connection, address: WeightBroadcastAddress, checkpoint: Path | None, lora: LoraSetup | None) -> None:
    """Receive every version that the pipe names, into an engine if there is a checkpoint; runs in the other process."""
    if checkpoint is None:
        receiver = WeightBroadcastReceiver(address)

        def receive(version: int) -> None:
            with receiver.receive(version) as weights:
                for _ in weights:
                    pass
    else:
        from roll_gspo.strategies.base import ModelSetup
        from roll_gspo.strategies.vllm.config import VllmConfig
        from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

        setup = ModelSetup(checkpoint, DTYPE, micro_batch_size=1, temperature=1.0, seed=0)
        config = VllmConfig(max_num_seqs=8, kv_cache_memory_mb=64, enforce_eager=True)
        engine = VllmGenerate(setup, config, 256, receives_broadcast=True, lora=lora)
        pipe.send("built")
        engine.connect(address)
        receive = engine.receive
    pipe.send("ready")
    while version := pipe.recv():
        receive(version)


class Remote:
    """A process with a receiver, and its sender in this process. With `lora` the receiver takes adapters, by gloo."""

    def __init__(
        self,
        checkpoint: Path | None,
        backend: Backend,
        weights: list[tuple[str, Tensor]],
        lora: LoraSetup | None = None,
    ) -> None:
        self._kind = FULL_MODEL if lora is None else ADAPTER
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        wanted = WeightBroadcastAddress("127.0.0.1", 0, 2, timeout_s=TIMEOUT_S, backend=backend)
        commands = WeightBroadcastSender(wanted) if backend == "gloo" else CommandSender(wanted)
        self._process = context.Process(target=serve, args=(theirs, commands.address, checkpoint, lora))
        with visible_gpus("1") if backend == "nccl" else nullcontext():
            self._process.start()
        if checkpoint is not None:
            self._expect("built")
        self._sender: WeightBroadcastSender | NativeWeightSender
        if isinstance(commands, WeightBroadcastSender):
            self._sender = commands
        else:
            from roll_gspo.strategies.vllm.engine.native_sender import NativeSender

            self._sender = NativeSender(commands.address, None, commands)
            self._sender.start(weights)
        self._expect("ready")
        self._version = 0

    def _expect(self, word: str) -> None:
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"the receiving process was not {word} within {TIMEOUT_S:g} s")
        assert self._pipe.recv() == word

    def send(self, weights: list[tuple[str, Tensor]], checksum: bool) -> None:
        """Send the weights; return after the receiver has them."""
        self._version += 1
        self._pipe.send(self._version)
        if isinstance(self._sender, WeightBroadcastSender):
            self._sender.send(weights, self._version, checksum, self._kind)
        else:
            self._sender.send(weights, self._version)

    def close(self) -> None:
        """End the receiving process."""
        self._pipe.send(0)
        self._process.join(TIMEOUT_S)
        self._process.kill()
        self._sender.close()


@contextmanager
def visible_gpus(numbers: str) -> Iterator[None]:
    """Let processes that start in the block see only these GPUs."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(millions: float, rounds: int, checksum: bool, with_engine: bool, backend: Backend) -> Cost:
    """Measure one size; the first round opens connections and touches memory, and does not count."""
    model = model_of(SHAPES[millions]).to(DTYPE)
    with tempfile.TemporaryDirectory() as folder:
        if with_engine:
            model.save_pretrained(folder)
        model.to("cuda" if ON_GPU else "cpu")
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        copies = [torch.empty_like(tensor) for _, tensor in weights]
        broadcast = Remote(None, backend, weights) if backend == "gloo" else None
        engine = Remote(Path(folder), backend, weights) if with_engine else None

        def copy() -> None:
            for target, (_, tensor) in zip(copies, weights, strict=True):
                target.copy_(tensor)
            if ON_GPU:
                torch.cuda.synchronize()

        cost = Cost(sum(tensor.nbytes for _, tensor in weights), [], [], [])
        try:
            for _ in range(rounds + 1):
                cost.copy.append(seconds(copy))
                if broadcast is not None:
                    cost.broadcast.append(seconds(lambda: broadcast.send(weights, checksum)))
                if engine is not None:
                    cost.engine.append(seconds(lambda: engine.send(weights, checksum)))
        finally:
            for remote in (broadcast, engine):
                if remote is not None:
                    remote.close()
    return Cost(cost.nbytes, cost.copy[1:], cost.broadcast[1:], cost.engine[1:])


def row(millions: float, backend: Backend, cost: Cost) -> str:
    """Return a row of the table; ratios are medians of the rounds' ratios."""

    def rate(times: list[float]) -> str:
        return f"{cost.nbytes / statistics.median(times) / 1e9:.2f}" if times else "–"

    def ratio(times: list[float]) -> str:
        pairs = zip(times, cost.copy, strict=True)
        return f"{statistics.median(time / copy for time, copy in pairs):.1f}" if times else "–"

    def milliseconds(times: list[float]) -> str:
        return f"{1e3 * statistics.median(times):.1f}" if times else "–"

    cells = [
        f"{millions:g} M ({cost.nbytes / 1e6:.0f} MB), {backend}",
        rate(cost.copy),
        *(rate(cost.broadcast), milliseconds(cost.broadcast), ratio(cost.broadcast)),
        *(rate(cost.engine), milliseconds(cost.engine), ratio(cost.engine)),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="time weight transfer against a copy of the same bytes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=float, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--largest-engine", type=float, default=300.0, help="million parameters")
    parser.add_argument("--checksum", action="store_true")
    parser.add_argument("--backends", nargs="+", choices=list(GPUS_NEEDED), default=list(GPUS_NEEDED))
    arguments = parser.parse_args()
    print("| parameters | copy, GB/s | broadcast, GB/s | ms | × copy | into vLLM, GB/s | ms | × copy |")
    print("|---|---|---|---|---|---|---|---|")
    for millions in arguments.sizes:
        for backend in arguments.backends:
            if torch.cuda.device_count() < GPUS_NEEDED[backend]:
                found = torch.cuda.device_count()
                print(f"| {millions:g} M, {backend}: skipped, needs {GPUS_NEEDED[backend]} GPU(s), found {found} |")
                continue
            with_engine = millions <= arguments.largest_engine
            cost = measure(millions, arguments.rounds, arguments.checksum, with_engine, backend)
            print(row(millions, backend, cost), flush=True)


if __name__ == "__main__":
    main()
