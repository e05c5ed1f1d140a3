"""Balance of a mini-batch over data-parallel ranks: in turn by length, against by estimated operations.

    python benchmarks/balance.py [--samples 128] [--median 1500] [--longest 16384] [--rounds 20]

Lengths are log-normal, the model has the shape of Qwen2.5-7B. A row shows the operations of the slowest rank divided by
the mean of the ranks, and the number of passes per rank: 1.00 means that no rank waits. No model runs.

* in turn: micro-batches filled in the order of the lengths, one rank after the other
* by operations: `split_samples` and `share_of_rank` with the costs of `PassCost`
"""

from __future__ import annotations

import argparse
import time

import torch

from roll_gspo.models.architecture import Architecture
from roll_gspo.models.pass_cost import PassCost
from roll_gspo.strategies.micro_batches import share_of_rank, split_samples

MODEL = Architecture(
    "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e-6, 1e6, tie_word_embeddings=False, experts=None
)
PROMPT, BUDGET = 128, 16_384


def slowest(parts: list[torch.Tensor], costs: torch.Tensor, ranks: int, balanced: bool) -> tuple[float, int]:
    """Return the cost of the slowest rank over the mean, and the passes of a rank."""
    of_parts = [int(costs[part].sum()) for part in parts] if balanced else None
    shares = [share_of_rank(parts, rank, ranks, 1, of_parts) for rank in range(ranks)]
    sums = [sum(int(costs[part].sum()) for part in share if part is not None) for share in shares]
    return max(sums) * ranks / sum(sums), len(shares[0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--median", type=int, default=1_500)
    parser.add_argument("--longest", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    cost = PassCost.of(MODEL)
    print("| ranks | in turn | passes | by operations | passes | seconds to assign |\n|---|---|---|---|---|---|")
    for ranks in (2, 4, 8, 16):
        totals = torch.zeros(5, dtype=torch.float64)
        for seed in range(arguments.rounds):
            spread = torch.randn(arguments.samples, generator=torch.Generator().manual_seed(seed))
            responses = (arguments.median * torch.exp(spread)).long().clamp(8, arguments.longest)
            lengths = responses + PROMPT
            costs = cost.per_token * lengths + cost.per_pair * lengths**2 + cost.per_prediction * responses
            before = slowest(split_samples(lengths, 1, BUDGET, packed=True), costs, ranks, balanced=False)
            start = time.perf_counter()
            parts = split_samples(lengths, 1, BUDGET, packed=True, ranks=ranks, costs=costs)
            after = slowest(parts, costs, ranks, balanced=True)
            totals += torch.tensor([*before, *after, time.perf_counter() - start])
        mean = (totals / arguments.rounds).tolist()
        print(f"| {ranks} | {mean[0]:.2f} | {mean[1]:.1f} | {mean[2]:.2f} | {mean[3]:.1f} | {mean[4]:.3f} |")


if __name__ == "__main__":
    main()
