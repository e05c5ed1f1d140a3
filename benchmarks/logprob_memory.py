"""Peak memory and time of log-probs and entropies with backward pass, with and without logits (Linux only).

    python benchmarks/logprob_memory.py [--tokens 1024] [--vocab 151936] [--hidden 256] [--dtype float32] [--rounds 5]
                                        [--threads 1]

Variants, each from hidden states [N, H] and a head [V, H] to the gradients of both:

* plain: `hidden @ head.T`, `log_softmax` in float32, gather and entropy, all by autograd
* logits: the same logits, then `strategies.log_probs` in chunks
* fused: `strategies.fused_scores`, which never holds all logits; its logits are float32
* rounded: the same with `fp32_lm_head: false`, whose logits have the dtype of the inputs (bfloat16 only)

Each variant runs in a fresh process, and all take turns in every round. The first round warms up and is not counted.
Time is CPU time of the process (all threads), with the median of the rounds' ratios to plain. Memory is the maximum of
the resident set over all rounds, minus the resident set after the inputs were made and a small problem was solved.
Gradients count.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from roll_gspo.strategies.fused_scores import scores_from_hidden
from roll_gspo.strategies.log_probs import token_log_probs

MIB = 2**20
VARIANTS = ("plain", "logits", "fused", "rounded")
GOAL_MEMORY, GOAL_TIME = 5.0, 1.1


class Problem(NamedTuple):
    """hidden [N, H], head [V, H] and tokens [N]."""

    hidden: Tensor
    head: Tensor
    tokens: Tensor

    @staticmethod
    def make(num_tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> Problem:
        """Make a random problem whose logits have a standard deviation of a few units."""
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(num_tokens, hidden, generator=generator, dtype=dtype).requires_grad_()
        head = torch.randn(vocab, hidden, generator=generator, dtype=dtype).mul_(3 * hidden**-0.5).requires_grad_()
        return Problem(states, head, torch.randint(vocab, (num_tokens,), generator=generator))

    def scores(self, variant: str) -> tuple[Tensor, Tensor | None]:
        """Return (log-probabilities, entropies)."""
        hidden, head, tokens = self
        if variant in ("fused", "rounded"):
            return scores_from_hidden(
                hidden,
                head,
                tokens,
                temperature=1.0,
                entropy=True,
                vocab_size=len(head),
                fp32_lm_head=variant == "fused",
            )
        logits = hidden @ head.t()
        if variant == "logits":
            return token_log_probs(logits, tokens, 1.0, entropy=True)
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def solve(self, variant: str) -> None:
        """Run forward and backward pass."""
        self.hidden.grad = self.head.grad = None
        log_probs, entropies = self.scores(variant)
        assert entropies is not None
        (log_probs.sum() + 0.1 * entropies.sum()).backward()


def answer(variant: str, arguments: argparse.Namespace) -> None:
    """Solve once per line of standard input; print CPU seconds and peak memory in bytes."""
    torch.set_num_threads(arguments.threads)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    Problem.make(64, 1024, arguments.hidden, dtype).solve(variant)
    problem = Problem.make(arguments.tokens, arguments.vocab, arguments.hidden, dtype)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for _ in sys.stdin:
        start = time.process_time()
        problem.solve(variant)
        seconds = time.process_time() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, flush=True)


def measure(rounds: int, variants: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Return (CPU seconds, peak bytes) of each round by variant."""
    command = [sys.executable, *sys.argv]
    children = {
        variant: subprocess.Popen(
            [*command, "--variant", variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for variant in variants
    }
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    try:
        for number in range(rounds + 1):
            for variant, process in children.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                line = process.stdout.readline().split()
                if not line:
                    raise SystemExit(f"{variant}: its process ended with {process.wait()}")
                if number:
                    found[variant].append((float(line[0]), float(line[1])))
    finally:
        for process in children.values():
            process.kill()
            process.wait()
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        return answer(arguments.variant, arguments)
    found = measure(arguments.rounds, VARIANTS if arguments.dtype == "bfloat16" else VARIANTS[:3])
    logits = arguments.tokens * arguments.vocab * 4 / MIB
    head = arguments.vocab * arguments.hidden * (4 if arguments.dtype == "float32" else 2) / MIB
    print(
        f"{arguments.tokens} tokens, vocabulary {arguments.vocab:,}, hidden size {arguments.hidden}, "
        f"{arguments.dtype}; {arguments.threads} thread(s), {arguments.rounds} rounds\n"
        f"float32 logits {logits:.0f} MiB, the gradient of the head {head:.0f} MiB\n"
    )
    print("| variant | peak, MiB | plain ÷ it | CPU s | × plain |\n|---|---|---|---|---|")
    peaks = {variant: rows[-1][1] for variant, rows in found.items()}
    ratios = {}
    for variant, rows in found.items():
        seconds = [row[0] for row in rows]
        ratios[variant] = statistics.median(s / p[0] for s, p in zip(seconds, found["plain"], strict=True))
        print(
            f"| {variant} | {peaks[variant] / MIB:.0f} | {peaks['plain'] / peaks[variant]:.1f} "
            f"| {statistics.median(seconds):.2f} | {ratios[variant]:.2f} |"
        )
    met = peaks["plain"] / peaks["fused"] >= GOAL_MEMORY and ratios["fused"] <= GOAL_TIME
    print(f"\ngoal ({GOAL_MEMORY:.0f} × less memory at up to {GOAL_TIME} × the time): {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
