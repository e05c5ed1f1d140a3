"""Tokens per second of a request stream, against chunks of a fixed size and against `LLM.generate`.

    python benchmarks/streaming.py [--rounds 3] [--requests 1024] [--median 32] [--capacity 64]

Response lengths are log-normal (sigma 1) with a maximum of 20 times the median. Each length is the request's
`max_new_tokens`, and no token ends a response early, so every way computes the same tokens.

* Two vLLM replicas in worker processes: the stream against chunks of 64 samples, two in flight per replica. A chunk
  ends with its longest response.
* One replica: the stream against `LLM.generate` on all prompts, called in the same worker.

The ways take turns in each round. The table shows medians: tokens per second, tokens per CPU second of the workers
(less noisy if other work uses the cores, but blind to idle workers), and the ratios of the stream to each way.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from roll_gspo.execution.base import Devices, ExecutionSettings, Pending, wait_first
from roll_gspo.execution.ray.executor import RayExecutor
from roll_gspo.execution.ray.group import RayGroup
from roll_gspo.roles.replica import Replica
from roll_gspo.roles.replicas import Replicas
from roll_gspo.strategies.base import GenerationRequest, ModelSetup, Sampling
from roll_gspo.strategies.vllm.config import VllmConfig

CHUNK = 64
IN_FLIGHT = 2
VOCABULARY = 256
PROMPT_TOKENS = 16
LONGEST = 20  # medians
HIDDEN, LAYERS = 256, 4


class ChunkReplica(Replica):
    """A replica that also generates chunks, and calls vLLM directly."""

    def chunk(self, requests: Sequence[GenerationRequest]) -> int:
        """Generate responses until all have ended; return the number of tokens."""
        self._requests.submit(requests)
        tokens = ended = 0
        while ended < len(requests):
            finished = self._requests.advance(10)
            ended += len(finished)
            tokens += sum(len(completion.token_ids) for _, completion in finished)
        return tokens

    def bare(self, requests: Sequence[GenerationRequest]) -> int:
        """Call `LLM.generate`; return the number of tokens."""
        from vllm import SamplingParams

        from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

        engine = self._engine
        assert isinstance(engine, VllmGenerate) and engine._engine is not None
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        sampling = [
            SamplingParams(
                seed=r.seed, max_tokens=r.sampling.max_new_tokens, ignore_eos=True, logprobs=0, detokenize=False
            )
            for r in requests
        ]
        outputs = engine._engine[0].generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


def make_replica(checkpoint: Path, capacity: int, longest: int) -> ChunkReplica:
    """Build a worker."""
    from roll_gspo.strategies.vllm.engine.generate import VllmGenerate

    setup = ModelSetup(checkpoint, torch.float32, 1, 1.0, 0)
    config = VllmConfig(max_num_seqs=capacity, load_format="auto", kv_cache_memory_mb=512)
    return ChunkReplica(VllmGenerate(setup, config, PROMPT_TOKENS + longest + 1, receives_broadcast=True))


def requests_of(count: int, median: int, seed: int) -> list[GenerationRequest]:
    """Return requests with long-tailed lengths."""
    random = np.random.default_rng(seed)
    lengths = np.clip(np.rint(median * random.lognormal(0, 1, count)), 1, LONGEST * median).astype(int).tolist()
    prompts = random.integers(0, VOCABULARY, (count, PROMPT_TOKENS)).tolist()
    return [
        GenerationRequest(key, tuple(prompt), Sampling(1, length), 1000 * seed + key)
        for key, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


class Rate(NamedTuple):
    """Tokens per second, and per CPU second of the workers."""

    wall: float
    cpu: float


def measured(group: RayGroup, requests: Sequence[GenerationRequest], way: Callable[[], int]) -> Rate:
    """Time a way that returns its number of tokens."""
    workers = [psutil.Process(group.pid(rank)) for rank in range(group.size)]

    def cpu_s() -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in workers)

    cpu, started = cpu_s(), time.perf_counter()
    tokens = way()
    seconds, cpu = time.perf_counter() - started, cpu_s() - cpu
    assert tokens == sum(request.sampling.max_new_tokens for request in requests)
    return Rate(tokens / seconds, tokens / cpu)


def stream(replicas: Replicas, requests: Sequence[GenerationRequest]) -> int:
    """Generate with a request stream."""
    tokens, client = 0, replicas.stream.open()
    client.submit(requests)
    while client.outstanding:
        tokens += sum(len(completion.token_ids) for _, completion in client.poll(1))
    return tokens


def chunks(group: RayGroup, requests: Sequence[GenerationRequest]) -> int:
    """Generate in chunks of a fixed size."""
    tokens = 0
    todo = deque(requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK))
    running: dict[Pending, int] = {}
    while todo or running:
        for rank in range(group.size):
            while todo and list(running.values()).count(rank) < IN_FLIGHT:
                running[group.submit("chunk", todo.popleft(), rank=rank)] = rank
        for pending in wait_first(list(running), timeout_s=0.25):
            del running[pending]
            tokens += pending.result()
    return tokens


def bare(group: RayGroup, requests: Sequence[GenerationRequest]) -> int:
    """Generate with `LLM.generate`."""
    return group.call("bare", requests)


def compare(
    group: RayGroup,
    ways: dict[str, Callable[[Sequence[GenerationRequest]], int]],
    rounds: int,
    count: int,
    median: int,
) -> None:
    """Print the rates of the ways, and the ratios of the first way to them."""
    rates: dict[str, list[Rate]] = {name: [] for name in ways}
    for way in ways.values():
        way(requests_of(32, 4, 99))  # the first batch allocates
    for number in range(rounds):
        requests = requests_of(count, median, number)
        for name, way in ways.items():
            rates[name].append(measured(group, requests, partial(way, requests)))
            print(f"  round {number}: {name}: {rates[name][-1].wall:,.0f}, {rates[name][-1].cpu:,.0f}", flush=True)
    first = rates[next(iter(ways))]
    for name, own in rates.items():
        wall = statistics.median(a.wall / b.wall for a, b in zip(first, own, strict=True))
        cpu = statistics.median(a.cpu / b.cpu for a, b in zip(first, own, strict=True))
        medians = [statistics.median(rate[kind] for rate in own) for kind in (0, 1)]
        print(f"| {name} | {medians[0]:,.0f} | {wall:.2f} | {medians[1]:,.0f} | {cpu:.2f} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1024, help="with two replicas; one gets half of them")
    parser.add_argument("--median", type=int, default=32, help="tokens of the median response")
    parser.add_argument("--capacity", type=int, default=64, help="responses that an engine decodes at the same time")
    arguments = parser.parse_args()
    longest = LONGEST * arguments.median
    executor = RayExecutor(ExecutionSettings(devices=(0, 1), devices_per_node=2))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        write_model(checkpoint, PROMPT_TOKENS + longest + 1)
        make = partial(make_replica, checkpoint, arguments.capacity, longest)
        for devices, count in (((0, 1), arguments.requests), ((0,), arguments.requests // 2)):
            group = executor.start_group("actor_infer", make, Devices(devices, 1, 2), one_world=False)
            print(f"| {len(devices)} replica(s), {count} responses | per s | ratio | per CPU s | ratio |", flush=True)
            baseline = {"chunks of 64": partial(chunks, group)} if len(devices) > 1 else {}
            direct = {} if baseline else {"LLM.generate": partial(bare, group)}
            ways = {"stream": partial(stream, Replicas(group, 0)), **baseline, **direct}
            compare(group, ways, arguments.rounds, count, arguments.median)
            group.close()
    executor.close()


def write_model(folder: Path, length: int) -> None:
    """Write a Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        head_dim=64,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
