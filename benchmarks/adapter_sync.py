"""Time the sync of a LoRA adapter into vLLM against the sync of all weights.

    python benchmarks/adapter_sync.py [--rounds 5] [--size 0.6] [--ranks 8 32]

The engines run in other processes and receive by gloo. The size is in million parameters of a tied dense Qwen3. Each
round sends all weights, then the adapter of each rank, on all linear layers. Every send changes the values, as an
optimizer step does. Times include the load into the engine. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from weight_transfer import DTYPE, SHAPES, Remote, model_of, seconds

from roll_gspo.strategies.lora import Adapter, AdapterWeights
from roll_gspo.strategies.lora_setup import LoraSetup

Weights = list[tuple[str, Tensor]]


def adapters(millions: float, ranks: Sequence[int]) -> dict[LoraSetup, Weights]:
    """Return the tensors of an adapter of every rank."""
    found = {}
    for rank in ranks:
        lora = LoraSetup(rank, 2.0 * rank, sync="adapter")
        adapter = Adapter(model_of(SHAPES[millions]), lora, seed=0)
        adapter.initialize()
        found[lora] = [(name, tensor.detach().clone()) for name, tensor in AdapterWeights(adapter, DTYPE)]
    return found


@torch.no_grad()
def timed_send(remote: Remote, weights: Weights) -> float:
    """Return the seconds of one send of new values."""
    for _, tensor in weights:
        tensor.add_(1e-3)
    return seconds(lambda: remote.send(weights, checksum=False))


def measure(millions: float, ranks: Sequence[int], rounds: int) -> list[tuple[str, int, list[float]]]:
    """Return (name, bytes, seconds of each round) of all weights and of every adapter.

    The first round opens connections and does not count.
    """
    model = model_of(SHAPES[millions]).to(DTYPE)
    full = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sources = [("all weights", full, Remote(Path(folder), "gloo", full))]
        for lora, weights in adapters(millions, ranks).items():
            sources.append((f"adapter of rank {lora.rank}", weights, Remote(Path(folder), "gloo", weights, lora)))
        try:
            times = [[timed_send(remote, weights) for _, weights, remote in sources] for _ in range(rounds + 1)]
        finally:
            for _, _, remote in sources:
                remote.close()
    return [
        (name, sum(tensor.nbytes for _, tensor in weights), [of_round[index] for of_round in times[1:]])
        for index, (name, weights, _) in enumerate(sources)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="time the sync of an adapter against the sync of all weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=float, choices=list(SHAPES), default=0.6, help="million parameters")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    (_, full_bytes, full_times), *_ = found = measure(arguments.size, arguments.ranks, arguments.rounds)
    print("| sent | MB | of all bytes | ms | of the time of all weights |")
    print("|---|---|---|---|---|")
    for name, nbytes, times in found:
        ratio = statistics.median(time / full for time, full in zip(times, full_times, strict=True))
        share, milliseconds = nbytes / full_bytes, 1e3 * statistics.median(times)
        print(f"| {name} | {nbytes / 1e6:.2f} | {share:.1%} | {milliseconds:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
