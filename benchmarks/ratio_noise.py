"""Rounding noise of the importance ratio by number format, response length and batch composition.

    python benchmarks/ratio_noise.py [--trainer hf_train|megatron_train] [--layers 4] [--hidden 256] [--vocab 8192]
                                     [--spread 1] [--samples 32] [--lengths 32 256] [--dtypes fp32 bf16]

A random Qwen3 scores random responses. Prints the root mean square of the log-ratio per response (GSPO) and per token
(GRPO) between two passes:

* same: recomputed old log-probs and an update, both in the same micro-batches; this is `actor/ratio_noise`
* single: the same with one sample per micro-batch
* other: the same with 16 samples per micro-batch of scoring, sorted by length, and 4 random ones of training
* moved: two scoring passes, the second with weights that differ by 1e-7 each. In float32 the ratio moves as well, which
  is the true change.
* engine: the trainer and `hf_infer`; this is `mismatch/ratio_rms`

Numbers are rounding errors, not times. They depend on the machine's matrix kernels. `--spread` is about the standard
deviation of the logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.ratio_noise import ratio_rms
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.config.strategy import ScoreStrategyArgs, TrainStrategyArgs, args_class
from roll_gspo.metrics import to_floats
from roll_gspo.models.tiny import TINY_MODELS, TinyModel, build_model, byte_tokenizer, save
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.mini_batches import MiniBatches
from roll_gspo.strategies.base import ModelSetup, OptimizerSetup
from roll_gspo.strategies.micro_batches import MicroBatching

PROMPT = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES: dict[str, Any] = {"mini_batch_size": 1 << 20, "num_epochs": 1, "max_consecutive_skipped_steps": 3, "seed": 0}


def main() -> None:
    """Print a line per dtype, pair of passes and response length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="hf_train")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--spread", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        for dtype in options.dtypes:
            for length in options.lengths:
                batch = random_batch(options.samples, length, options.vocab)
                for name, response, token in noises(Path(folder), options.trainer, dtype, batch):
                    print(
                        f"{dtype}  {length:>5} tokens  {name:<7} response {response:8.1e}  token {token:8.1e}",
                        flush=True,
                    )


def write_models(folder: Path, options: argparse.Namespace) -> None:
    """Write a random model into `at`, and one whose weights differ by 1e-7 into `moved`."""
    shape = {
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
        "vocab_size": options.vocab,
        "max_position_embeddings": PROMPT + max(options.lengths),
        "initializer_range": options.spread * options.hidden**-0.5,
    }
    model = build_model(TinyModel({**TINY_MODELS["tiny_qwen3"].hf_config, **shape}), seed=0)
    save(model, byte_tokenizer(), folder / "at")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).sign(), alpha=1e-7)
    save(model, byte_tokenizer(), folder / "moved")


def random_batch(num_samples: int, length: int, vocab: int) -> TrainBatch:
    """Make random samples whose responses have half to all of `length` tokens."""
    generator = torch.Generator().manual_seed(length)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, vocab, (count,), generator=generator).tolist()

    lengths = torch.randint(length // 2, length + 1, (num_samples,), generator=generator).tolist()
    sequences = Sequences.collate([tokens(PROMPT) for _ in lengths], [tokens(n) for n in lengths], pad=0)
    zeros = torch.zeros(sequences.response_mask.shape)
    advantages = torch.randn(num_samples, 1, generator=generator).expand_as(zeros)
    return TrainBatch(sequences, torch.arange(num_samples), advantages, zeros, zeros)


def noises(folder: Path, trainer: str, dtype: str, batch: TrainBatch) -> Iterator[tuple[str, float, float]]:
    """Yield (pair of passes, noise per response, noise per token)."""

    def strategy(name: str, size: int) -> Any:
        setup = ModelSetup(folder / name, DTYPES[dtype], size, 1.0, 0)
        args = args_class(trainer, TrainStrategyArgs).model_validate({"strategy_name": trainer})
        return args.build_train(setup, OptimizerSetup(0.0, 1000, 1.0))

    for name, scoring, training in (("same", 4, 4), ("single", 1, 1), ("other", 16, 4)):
        built = strategy("at", scoring)
        old = in_micro_batches(built, batch, 4) if name == "same" else built.score(batch.sequences).log_probs
        scored = replace(batch, old_log_probs=old, rollout_log_probs=old)
        yield name, *(updated(built, scored, level, training) for level in ("seq", "token"))
    old, mask = strategy("at", 16).score(batch.sequences).log_probs, batch.response_mask
    scorer = args_class("hf_infer", ScoreStrategyArgs).model_validate({"strategy_name": "hf_infer"})
    engine = scorer.build_scorer(ModelSetup(folder / "at", DTYPES[dtype], 16, 1.0, 0))
    for name, other in (("moved", strategy("moved", 16)), ("engine", engine)):
        new = other.score(batch.sequences).log_probs
        found = {level: ratio_rms(new, old, mask, settings(level)) for level in ("seq", "token")}
        yield name, *to_floats(found).values()


def in_micro_batches(strategy: Any, batch: TrainBatch, size: int) -> Tensor:
    """Return log-probs [B, T] that are computed in the micro-batches of the update."""
    mini_batches = MiniBatches("", mini_batch_size=1 << 20, num_epochs=1, max_consecutive_skipped_steps=1, seed=0)
    (index,) = mini_batches.indices(batch, 1)
    log_probs = torch.zeros_like(batch.old_log_probs)
    for rows in index.split(size):
        found = strategy.score(batch.sequences.rows(rows)).log_probs
        log_probs[rows, : found.shape[1]] = found
    return log_probs


def updated(strategy: Any, batch: TrainBatch, level: str, size: int) -> float:
    """Return `actor/ratio_noise` of an update with learning rate 0."""
    actor = Actor(strategy, settings(level), micro_batching=MicroBatching(size), **SIZES)
    return actor.update(batch, 1, lambda done, total: None)["actor/ratio_noise"]


def settings(level: str) -> PolicyLossSettings:
    """Return the settings of a loss with a ratio at this level."""
    return PolicyLossSettings(level, 3e-4, 4e-4, None, "seq-mean-token-mean", 1)


if __name__ == "__main__":
    main()
