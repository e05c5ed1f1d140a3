"""Tokens per second of a request stream, against chunks of a fixed size and against `LLM.generate`.

    python benchmarks/streaming.py [--rounds 3] [--requests 1024] [--median 32] [--capacity 64]

Response lengths are log-normal (sigma 1) with a maximum of 20 times the median. Each length is the request's
`max_new_tokens`, and no token ends a response early, so every way computes the same tokens.

* Two vLLM replicas in worker processes: the stream against chunks of 64 samples, two in flight per replica. A chunk
  ends with its longest response.
* One replica: the stream against `LLM.generate` on all prompts, called in the same worker.

The ways take turns in each round. The table shows medians, and the median of the rounds' ratios.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
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

    def bare(self, requests: Sequence[GenerationRequest]) -> tuple[int, float]:
        """Return the tokens of `LLM.generate`, and its seconds."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        sampling = [
            SamplingParams(
                seed=r.seed, max_tokens=r.sampling.max_new_tokens, ignore_eos=True, logprobs=0, detokenize=False
            )
            for r in requests
        ]
        started = time.perf_counter()
        outputs = self._engine._engine[0].generate(prompts, sampling, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs), time.perf_counter() - started


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


def stream(replicas: Replicas, requests: Sequence[GenerationRequest]) -> float:
    """Return the tokens per second of a request stream."""
    started, tokens = time.perf_counter(), 0
    client = replicas.stream.open()
    client.submit(requests)
    while client.outstanding:
        tokens += sum(len(completion.token_ids) for _, completion in client.poll(1))
    return rate(requests, tokens, time.perf_counter() - started)


def chunks(group: RayGroup, requests: Sequence[GenerationRequest]) -> float:
    """Return the tokens per second of chunks of a fixed size."""
    started, tokens = time.perf_counter(), 0
    todo = deque(requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK))
    running: dict[Pending, int] = {}
    while todo or running:
        for rank in range(group.size):
            while todo and list(running.values()).count(rank) < IN_FLIGHT:
                running[group.submit("chunk", todo.popleft(), rank=rank)] = rank
        for pending in wait_first(list(running), timeout_s=0.25):
            del running[pending]
            tokens += pending.result()
    return rate(requests, tokens, time.perf_counter() - started)


def bare(group: RayGroup, requests: Sequence[GenerationRequest]) -> float:
    """Return the tokens per second of `LLM.generate`."""
    return rate(requests, *group.call("bare", requests))


def rate(requests: Sequence[GenerationRequest], tokens: int, seconds: float) -> float:
    """Return tokens per second, after a check that no way computed fewer tokens."""
    assert tokens == sum(request.sampling.max_new_tokens for request in requests)
    return tokens / seconds


def compare(
    rounds: int, ways: dict[str, Callable[[Sequence[GenerationRequest]], float]], count: int, median: int
) -> None:
    """Print the rates of the ways, and their ratios to the first way."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        way(requests_of(32, 4, 99))  # the first batch compiles and allocates
        del name
    for number in range(rounds):
        requests = requests_of(count, median, number)
        for name, way in ways.items():
            rates[name].append(way(requests))
            print(f"  round {number}: {name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    first, *others = ways
    print(f"| {first} | {statistics.median(rates[first]):,.0f} | 1.00 |")
    for name in others:
        ratio = statistics.median(a / b for a, b in zip(rates[first], rates[name], strict=True))
        print(f"| {name} | {statistics.median(rates[name]):,.0f} | {ratio:.2f} |", flush=True)


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
            print(f"{len(devices)} replica(s), {count} responses | tokens/s | stream is faster by", flush=True)
            baseline = {"chunks of 64": partial(chunks, group)} if len(devices) > 1 else {}
            direct = {} if baseline else {"LLM.generate": partial(bare, group)}
            ways = {"stream": partial(stream, Replicas(group, 0)), **baseline, **direct}
            compare(arguments.rounds, ways, count, arguments.median)
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
