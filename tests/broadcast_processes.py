"""Processes that send or receive a weight broadcast on behalf of a test."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from roll_gspo.batch import Completion
from roll_gspo.strategies.base import ModelSetup, Sampling
from roll_gspo.strategies.lora_setup import LoraSetup
from roll_gspo.strategies.vllm.config import VllmConfig
from roll_gspo.strategies.weight_broadcast import WeightBroadcastAddress, WeightBroadcastReceiver, WeightBroadcastSender

Packed = list[tuple[str, str, tuple[int, ...], bytes]]


def packed(tensors: list[tuple[str, Tensor]]) -> Packed:
    """Return names, dtypes, shapes and bytes."""
    return [
        (name, str(t.dtype), tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors
    ]


class ProcessError(Exception):
    """The error of a process, as text."""


class Process:
    """A spawned process with one `Worker`: `start` a method, then read its `result`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def start(self, method: Callable[..., object], *args: object) -> None:
        self._pipe.send((method.__name__, args))

    def result(self, timeout_s: float = 120.0) -> object:
        assert self._pipe.poll(timeout_s), f"no answer within {timeout_s} s"
        error, value = self._pipe.recv()
        if error:
            raise ProcessError(error)
        return value

    def call(self, method: Callable[..., object], *args: object) -> object:
        self.start(method, *args)
        return self.result()

    def close(self) -> None:
        """Close the pipe and check that the process exits."""
        self._pipe.close()
        self.process.join(60)
        alive = self.process.is_alive()
        self.process.kill()
        assert not alive, "the process did not end"


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    worker = Worker()
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            break
        try:
            answer = "", getattr(worker, name)(*args)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}", None
        pipe.send(answer)


class Worker:
    """Holds a sender, a receiver or a vLLM engine."""

    receiver: WeightBroadcastReceiver
    sender: WeightBroadcastSender

    def connect(self, address: WeightBroadcastAddress, rank: int) -> None:
        self.receiver = WeightBroadcastReceiver(address, rank, name="engine")

    def receive(self, version: int) -> Packed:
        """Receive and keep all tensors, so that an overwritten bucket is detected."""
        with self.receiver.receive(version) as weights:
            return packed(list(weights))

    def fail_in(self, version: int, after: int) -> None:
        with self.receiver.receive(version) as weights:
            for count, (name, _) in enumerate(weights):
                if count == after:
                    raise ValueError(f"cannot load {name}")

    def stop_in(self, version: int, after: int) -> None:
        with self.receiver.receive(version) as weights:
            for _ in range(after):
                next(weights)

    def die_in(self, version: int, after: int) -> None:
        with self.receiver.receive(version) as weights:
            for count, _ in enumerate(weights):
                if count == after:
                    os._exit(1)

    def open_sender(self, world_size: int, timeout_s: float) -> WeightBroadcastAddress:
        self.sender = WeightBroadcastSender(
            WeightBroadcastAddress("127.0.0.1", 0, world_size, timeout_s=timeout_s), bucket_bytes=1024
        )
        return self.sender.address

    def send_and_die(self, version: int) -> None:
        def source() -> Iterator[tuple[str, Tensor]]:
            for index in range(10):
                yield f"w{index}", torch.ones(200)
            os._exit(1)

        self.sender.send(source(), version)

    def send_model(self, family: str, seed: int, version: int) -> None:
        from tiny_models import build_model

        from roll_gspo.strategies.hf.model import HfWeights

        self.sender.send(HfWeights(build_model(family, seed)), version)

    def build_engine(self, folder: Path, tensor_parallel_size: int, lora: LoraSetup | None = None) -> None:
        from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

        config = VllmConfig(max_num_seqs=32, kv_cache_memory_mb=32, tensor_parallel_size=tensor_parallel_size)
        setup = ModelSetup(folder, torch.float32, micro_batch_size=1, temperature=1.0, seed=0)
        self.engine = VllmGenerate(setup, config, 256, receives_broadcast=True, lora=lora)

    def pretend_gpus(self) -> None:
        from file_gpus import install

        install(setattr)

    def connect_engine(self, address: WeightBroadcastAddress) -> None:
        self.engine.connect(address)

    def receive_engine(self, version: int) -> None:
        self.engine.receive(version)

    def update_engine(self) -> None:
        self.engine.update_weights([], 1)  # type: ignore[arg-type]

    def generate(self, prompts: list[list[int]], num_samples: int, max_new_tokens: int) -> list[list[Completion]]:
        return self.engine.generate(prompts, Sampling(num_samples, max_new_tokens), list(range(len(prompts))))

    def shutdown_engine(self) -> int:
        """Return the number of child processes."""
        import psutil

        self.engine.shutdown()
        below = psutil.Process().children(recursive=True)
        return len([child for child in below if "resource_tracker" not in " ".join(child.cmdline())])
