"""What it costs to hand weights to an engine in another process, against a copy of the same bytes in this one.

    python benchmarks/weight_transfer.py [--rounds 9] [--sizes 0.6 20 300] [--checksum]

For each size (million parameters, float32, a tied dense Qwen3 with random weights): the wire alone, whose receiver
drops the tensors, and the whole way into a running vLLM engine, which repacks them for its kernels. In each round three
things are timed one after the other: a copy (`tensor.copy_`) of every tensor into another that exists already, the
transfer over the wire, and the one into the engine. `--largest-engine 20` leaves larger engines out: the last needs
several GB of memory for trainer, copies and engine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: a thread that spins takes the core from the process at the other end.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver, WeightBroadcastSender

TIMEOUT_S = 120.0


class Shape(NamedTuple):
    """Of a model."""

    hidden: int
    layers: int
    vocabulary: int


SHAPES = {0.6: Shape(128, 3, 256), 20.0: Shape(512, 5, 4096), 300.0: Shape(1280, 12, 32768)}


class Cost(NamedTuple):
    """Of one size: bytes, and seconds of each round."""

    nbytes: int
    copy: list[float]
    wire: list[float]
    engine: list[float]


def model_of(shape: Shape) -> Qwen3ForCausalLM:
    """Random weights."""
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


def serve(pipe: Connection, address: WeightBroadcastAddress, checkpoint: Path | None) -> None:
    """The other process: receive a version for each that the pipe names, into an engine if there is a checkpoint."""
    if checkpoint is None:
        receiver = WeightBroadcastReceiver(address)

        def receive(version: int) -> None:
            with receiver.receive(version) as weights:
                for _ in weights:
                    pass
    else:
        from roll_gspo.config.strategy import VllmConfig
        from roll_gspo.strategies.base import ModelSetup
        from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

        setup = ModelSetup(checkpoint, torch.float32, micro_batch_size=1, temperature=1.0, seed=0)
        engine = VllmGenerate(setup, VllmConfig(max_num_seqs=8, kv_cache_memory_mb=64), 256, receives_broadcast=True)
        engine.connect(address)
        receive = engine.receive
    pipe.send("ready")
    while version := pipe.recv():
        receive(version)


class Remote:
    """A process with one receiver, and the sender in this one."""

    def __init__(self, checkpoint: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._sender = WeightBroadcastSender(WeightBroadcastAddress("127.0.0.1", 0, 2, timeout_s=TIMEOUT_S))
        self._process = context.Process(target=serve, args=(theirs, self._sender.address, checkpoint))
        self._process.start()
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"the receiving process was not ready within {TIMEOUT_S:g} s")
        self._pipe.recv()
        self._version = 0

    def send(self, weights: list[tuple[str, Tensor]], checksum: bool) -> None:
        """Returns when the other side has them."""
        self._version += 1
        self._pipe.send(self._version)
        self._sender.send(weights, self._version, checksum)

    def close(self) -> None:
        """End the process."""
        self._pipe.send(0)
        self._process.join(TIMEOUT_S)
        self._process.kill()
        self._sender.close()


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(millions: float, rounds: int, checksum: bool, with_engine: bool) -> Cost:
    """All rounds of one size; the first of each, which opens connections and touches memory, does not count."""
    model = model_of(SHAPES[millions])
    with tempfile.TemporaryDirectory() as folder:
        if with_engine:
            model.save_pretrained(folder)
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        copies = [torch.empty_like(tensor) for _, tensor in weights]
        wire, engine = Remote(None), Remote(Path(folder)) if with_engine else None

        def copy() -> None:
            for target, (_, tensor) in zip(copies, weights, strict=True):
                target.copy_(tensor)

        cost = Cost(sum(tensor.nbytes for _, tensor in weights), [], [], [])
        try:
            for _ in range(rounds + 1):
                cost.copy.append(seconds(copy))
                cost.wire.append(seconds(lambda: wire.send(weights, checksum)))
                if engine is not None:
                    cost.engine.append(seconds(lambda: engine.send(weights, checksum)))
        finally:
            wire.close()
            if engine is not None:
                engine.close()
    return Cost(cost.nbytes, cost.copy[1:], cost.wire[1:], cost.engine[1:])


def row(millions: float, cost: Cost) -> str:
    """Of the table; ratios are medians of the rounds' own ratios."""

    def rate(times: list[float]) -> str:
        return f"{cost.nbytes / statistics.median(times) / 1e9:.2f}" if times else "–"

    def ratio(times: list[float]) -> str:
        pairs = zip(times, cost.copy, strict=True)
        return f"{statistics.median(time / copy for time, copy in pairs):.1f}" if times else "–"

    def milliseconds(times: list[float]) -> str:
        return f"{1e3 * statistics.median(times):.1f}" if times else "–"

    cells = [
        f"{millions:g} M ({cost.nbytes / 1e6:.0f} MB)",
        rate(cost.copy),
        *(rate(cost.wire), milliseconds(cost.wire), ratio(cost.wire)),
        *(rate(cost.engine), milliseconds(cost.engine), ratio(cost.engine)),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="weight transfer against a copy of the same bytes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=float, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--largest-engine", type=float, default=300.0, help="million parameters")
    parser.add_argument("--checksum", action="store_true")
    arguments = parser.parse_args()
    print("| parameters | copy, GB/s | wire, GB/s | ms | × copy | into vLLM, GB/s | ms | × copy |")
    print("|---|---|---|---|---|---|---|---|")
    for millions in arguments.sizes:
        with_engine = millions <= arguments.largest_engine
        print(row(millions, measure(millions, arguments.rounds, arguments.checksum, with_engine)), flush=True)


if __name__ == "__main__":
    main()
