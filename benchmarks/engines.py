"""Time an update and measure its memory with every training engine, on one and two ranks.

    python benchmarks/engines.py [--rounds 3] [--sizes 5 20] [--samples 32] [--tokens 256]

An update is one optimizer step over the same samples in float32: forward and backward passes of 4 samples, gradient
clipping and AdamW. Every variant runs in new processes with one thread per rank. Variants take turns in every round, so
that all of them meet the same load. The first update of a process is not counted.

Memory is the peak resident set of a rank minus that before its model was built: weights, gradients, optimizer state and
activations. The tables show medians over the rounds, and ratios to `hf`, which has one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Million parameters of a Qwen3 -> its shape.
SHAPES = {
    5: {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
    20: {"hidden_size": 448, "intermediate_size": 1344, "num_hidden_layers": 8},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Variant -> (engine, ranks, options)
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "hf": ("hf", 1, {}),
    "fsdp2": ("fsdp2", 1, {}),
    "megatron": ("megatron", 1, {}),
    "fsdp2, 2 ranks": ("fsdp2", 2, {}),
    "fsdp2, 2 ranks, kept layers": ("fsdp2", 2, {"reshard_after_forward": False}),
    "megatron, 2 ranks, tensor parallel": ("megatron", 2, TENSOR),
    "megatron, 2 ranks, data parallel": ("megatron", 2, {"use_distributed_optimizer": True}),
}
UPDATES = 3


def write_model(folder: Path, size: int) -> None:
    """Write a random checkpoint."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPES[size], **HEADS, tie_word_embeddings=True)).save_pretrained(folder)


def run_rank(variant: str, folder: Path, samples: int, tokens: int) -> None:
    """Run the updates of one rank; rank 0 prints seconds per update and MiB per rank as JSON."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    from roll_gspo.batch import Sequences, TrainBatch
    from roll_gspo.strategies.micro_batches import MicroBatching

    generator = torch.Generator().manual_seed(1)
    lengths = (tokens * (0.75 + 0.5 * torch.rand(samples, generator=generator))).int().tolist()
    ids = [torch.randint(HEADS["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    sequences = Sequences.collate([row[:16] for row in ids], [row[16:] for row in ids], pad=0)
    zeros = torch.zeros(sequences.response_mask.shape)
    advantages = torch.randn(samples, 1, generator=generator).expand_as(zeros)
    batch = TrainBatch(sequences, torch.arange(samples), advantages, zeros, zeros)

    def loss(scores: Any, part: TrainBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        return -torch.where(part.response_mask, scores.log_probs * part.advantages, 0.0).sum() / 1000, {}

    engine_name, _, options = VARIANTS[variant]
    engine = build(engine_name, folder, options, warm_up=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = build(engine_name, folder, options)
    seconds, result = [], None
    for _ in range(UPDATES + 1):
        dist.barrier()
        start = time.perf_counter()
        result = engine.update(MicroBatching(4).split(batch), loss, False)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    held: list[Any] = [None] * world_size
    dist.all_gather_object(held, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    if rank == 0:
        found = {"seconds": statistics.median(seconds[1:]), "mib": max(held), "loss": result.loss}
        print(json.dumps(found | {"norm": result.grad_norm}))
    dist.destroy_process_group()


def build(engine: str, folder: Path, options: dict[str, Any], warm_up: bool = False) -> Any:
    """Build an engine; with `warm_up`, import its module only."""
    import torch

    from roll_gspo.strategies.base import ModelSetup, OptimizerSetup

    setup = ModelSetup(folder, torch.float32, 4, temperature=1.0, seed=0)
    optimizer = OptimizerSetup(learning_rate=1e-4, total_steps=100, max_grad_norm=1.0)
    if engine == "hf":
        from roll_gspo.strategies.hf.config import HfConfig
        from roll_gspo.strategies.hf.train import HfTrain

        return None if warm_up else HfTrain(setup, optimizer, HfConfig(**options))
    if engine == "fsdp2":
        from roll_gspo.strategies.fsdp2.config import Fsdp2Config
        from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train

        return None if warm_up else Fsdp2Train(setup, optimizer, Fsdp2Config(**options))
    from roll_gspo.strategies.megatron.config import MegatronConfig
    from roll_gspo.strategies.megatron.engine import MegatronTrain

    return None if warm_up else MegatronTrain(setup, optimizer, MegatronConfig(**options))


def measure(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run a variant in new processes and return what rank 0 prints."""
    ranks = VARIANTS[variant][1]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--variant", variant, "--folder", str(folder)]
    command += ["--samples", str(options.samples), "--tokens", str(options.tokens)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=900)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{variant}: a rank failed; its error is above")
    return json.loads(texts[0].strip().splitlines()[-1])


def main() -> None:
    """Print a table per size."""
    parser = argparse.ArgumentParser(description="time an update with every training engine")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SHAPES, default=list(SHAPES), help="million parameters")
    parser.add_argument("--samples", type=int, default=32, help="samples of an update")
    parser.add_argument("--tokens", type=int, default=256, help="mean length of a sample")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        run_rank(options.variant, options.folder, options.samples, options.tokens)
        return
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), size)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
            for _ in range(options.rounds):
                for name in VARIANTS:
                    found[name].append(measure(name, Path(folder), options))
        print(f"\n{size} M parameters, {options.samples} samples of about {options.tokens} tokens\n")
        print("| engine | s per update | of hf | MiB per rank | of hf | loss | gradient norm |")
        print("|---|---|---|---|---|---|---|")
        for name, rounds in found.items():
            seconds, mib = (statistics.median(one[key] for one in rounds) for key in ("seconds", "mib"))
            time_ratio, memory_ratio = (
                statistics.median(one[key] / other[key] for one, other in zip(rounds, found["hf"], strict=True))
                for key in ("seconds", "mib")
            )
            last = rounds[-1]
            print(
                f"| {name} | {seconds:.2f} | {time_ratio:.2f} | {mib:.0f} | {memory_ratio:.2f} | {last['loss']:.6f} | "
                f"{last['norm']:.6f} |"
            )


if __name__ == "__main__":
    main()
