"""Time to split a batch into micro-batches, against lengths that are computed anew for every piece.

    python benchmarks/splitting.py [--samples 256 512] [--tokens 2048] [--sizes 1 4]

One row per number of samples and size of a piece. "update" is `TrainBatch.split`, "scoring" is `Sequences.rows` of
samples sorted by length. The ratio is between the two ways, in turn on the same batch. The last column is the time per
token: it stays the same if the time is linear in the batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from roll_gspo.batch import Sequences, TrainBatch


def make_batch(num_samples: int, num_tokens: int) -> TrainBatch:
    """Return a batch with responses of half to all of `num_tokens`."""
    lengths = torch.randint(num_tokens // 2, num_tokens + 1, (num_samples,), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(num_tokens) < lengths[:, None]
    sequences = Sequences(
        torch.zeros(num_samples, num_tokens + 8, dtype=torch.int64), torch.full((num_samples,), 8), mask
    )
    values = torch.zeros(num_samples, num_tokens)
    return TrainBatch(sequences, torch.arange(num_samples), values, values, values)


def pieces(sequences: Sequences, size: int) -> tuple[torch.Tensor, ...]:
    """Return the indices of the pieces that scoring uses."""
    return sequences.lengths.argsort(stable=True).split(size)


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(batch: TrainBatch, size: int) -> None:
    """Print the two rows of a batch and a size."""
    sequences, count = batch.sequences, len(batch)

    def update_anew() -> None:
        for index in torch.arange(count).split(size):
            replace(batch, sequences=replace(sequences)).rows(index)

    calls = {
        "update": (lambda: batch.split(size), update_anew),
        "scoring": (
            lambda: [sequences.rows(index) for index in pieces(sequences, size)],
            lambda: [replace(sequences).rows(index) for index in pieces(sequences, size)],
        ),
    }
    num_tokens = int(batch.response_mask.sum())
    for name, (once, anew) in calls.items():
        times = seconds(once), seconds(anew)
        print(
            f"{name:8} {count:6} × {batch.response_mask.shape[1]:<6} pieces of {size:<3} {times[0]:8.3f} s  "
            f"lengths per piece {times[1]:8.2f} s  ratio {times[1] / times[0]:7.1f}  "
            f"{1e9 * times[0] / num_tokens:6.1f} ns per token"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for num_samples in arguments.samples:
        batch = make_batch(num_samples, arguments.tokens)
        for size in arguments.sizes:
            compare(batch, size)


if __name__ == "__main__":
    main()
