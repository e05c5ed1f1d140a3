"""Time an update on samples of unequal length: padded, batched by length, and packed.

    python benchmarks/packing.py [--samples 64] [--longest 512] [--rounds 5]

One optimizer step of a Qwen3 of 2.4 M parameters on megatron-core, on the same mini-batch with log-normal lengths:

* padded: micro-batches of 8 samples in their order, padded to the longest
* sorted: dynamic batching (`max_tokens_per_microbatch_in_train`), samples of similar length together, padded
* packed: dynamic batching and `use_sequence_packing`, no padding

The variants take turns in every round, after a first one that warms up. The table shows the median of the rounds'
ratios, with losses and gradient norms: no variant may change a number.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.metrics import Metric
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup, TokenScores, UpdateResult
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine import MegatronTrain
from roll_gspo.strategies.micro_batches import MicroBatching

VOCAB = 4096
MAX_TOKENS = 2048
GOAL = 1.5
VARIANTS = {
    "padded": (MegatronConfig(), MicroBatching(8)),
    "sorted": (MegatronConfig(), MicroBatching(8, MAX_TOKENS)),
    "packed": (MegatronConfig(use_sequence_packing=True), MicroBatching(8, MAX_TOKENS, packed=True)),
}


def long_tailed_batch(samples: int, longest: int) -> TrainBatch:
    """Make prompts of 16 tokens and responses whose median length is an eighth of the longest."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(samples, generator=generator)
    lengths = (longest / 8 * torch.exp(spread)).clamp(4, longest).long().tolist()

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=generator).tolist()

    sequences = Sequences.collate([tokens(16) for _ in lengths], [tokens(length) for length in lengths], pad=0)
    zeros = torch.zeros(sequences.response_mask.shape)
    advantages = torch.randn(samples, 1, generator=generator).expand_as(zeros)
    return TrainBatch(sequences, torch.arange(samples), advantages, zeros, zeros)


def loss(scores: TokenScores, batch: TrainBatch) -> tuple[Tensor, dict[str, Metric]]:
    """Return the advantage-weighted log-probabilities as a loss."""
    return -torch.where(batch.response_mask, scores.log_probs * batch.advantages, 0.0).sum() / 1000, {}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="time an update step: padded, batched by length, and packed")
    parser.add_argument("--samples", type=int, default=64, help="samples of the mini-batch")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest response")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    arguments = parser.parse_args()
    batch = long_tailed_batch(arguments.samples, arguments.longest)
    lengths = batch.sequences.lengths
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
        setup = ModelSetup(Path(folder), torch.float32, 8, temperature=1.0, seed=0)
        optimizer = OptimizerSetup(learning_rate=1e-9, total_steps=1000, max_grad_norm=1.0)
        engines = {name: MegatronTrain(setup, optimizer, layout) for name, (layout, _) in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    results: dict[str, UpdateResult] = {}
    for number in range(arguments.rounds + 1):
        for name, (_, batching) in VARIANTS.items():
            start = time.perf_counter()
            results[name] = engines[name].update(batching.split(batch), loss, False)
            if number:
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{len(batch)} samples of {int(lengths.min())} to {int(lengths.max())} tokens (median {int(lengths.median())}, "
        f"{int(lengths.sum())} in total), {arguments.rounds} rounds, {torch.get_num_threads()} thread(s)\n"
    )
    print("| variant | passes | tokens with padding | s per step | times faster than padded | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, batching) in VARIANTS.items():
        parts = batching.split(batch)
        held = sum(int(p.sequences.lengths.sum()) if batching.packed else p.sequences.input_ids.numel() for p in parts)
        faster = statistics.median(a / b for a, b in zip(seconds["padded"], seconds[name], strict=True))
        result = results[name]
        print(
            f"| {name} | {len(parts)} | {held} | {statistics.median(seconds[name]):.2f} | {faster:.2f} | "
            f"{result.loss:.5f} | {result.grad_norm:.5f} |"
        )
    print(f"\ngoal: packed at least {GOAL:g} times faster than padded")


if __name__ == "__main__":
    main()
