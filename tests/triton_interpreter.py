"""Scores of the Triton kernels in Triton's interpreter: a program that computes every case on one or two ranks.

    TRITON_INTERPRET=1 python tests/triton_interpreter.py RANK WORLD_SIZE FOLDER

The variable has to be set before Triton is imported, so the cases run in separate processes. Rank r writes its
results to FOLDER/r.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from vocabulary_parallel import VOCAB, Head, Solution, solution

from roll_gspo.strategies import fused_scores, fused_scores_triton
from roll_gspo.strategies.fused_scores import FusedHead, scores_from_hidden


class Case(NamedTuple):
    """A head, and how its scores are computed."""

    num_tokens: int
    padded: int
    dtype: torch.dtype
    temperature: float = 1.0
    entropy: bool = True
    fp32_lm_head: bool | None = None
    hidden: int = 12
    split: bool = False
    outside: bool = False
    large_blocks: bool = True

    @property
    def head(self) -> Head:
        """Return the inputs; with `outside`, two tokens are outside the vocabulary."""
        head = Head.make(self.num_tokens, self.padded, self.dtype, self.hidden)
        if self.outside:
            head.tokens[2], head.tokens[3] = VOCAB, -1
        return head

    def solve(self, head: Head, fused_head: FusedHead, **place: Any) -> Solution:
        """Return scores and gradients; without `entropy` the gradients are those of the log-probs."""
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (head.hidden, head.weight))
        log_probs, entropies = scores_from_hidden(
            hidden,
            weight,
            head.tokens,
            temperature=self.temperature,
            entropy=self.entropy,
            vocab_size=VOCAB,
            fp32_lm_head=self.fp32_lm_head,
            fused_head=fused_head,
            **place,
        )
        if entropies is None:
            entropies = log_probs * 0
        return solution(log_probs, entropies, hidden, weight, head.upstream)


CASES = {
    f"{str(dtype).removeprefix('torch.')} {name}": case
    for dtype in (torch.float32, torch.bfloat16)
    for name, case in {
        "odd sizes": Case(20, 61, dtype),
        "temperature and padding": Case(17, 64, dtype, 0.6, hidden=20),
        "without entropy": Case(17, 64, dtype, 0.6, entropy=False),
        "sizes that tiles divide": Case(16, 64, dtype, hidden=32),
        "one token": Case(1, 61, dtype),
        "no token": Case(0, 61, dtype),
        "tokens outside the vocabulary": Case(17, 64, dtype, outside=True),
        "several blocks of gradients": Case(17, 61, dtype, 0.6, large_blocks=False),
        "two ranks": Case(20, 62, dtype, 0.6, split=True),
        "two ranks, one with padding only": Case(17, 128, dtype, split=True),
        "two ranks without token": Case(0, 62, dtype, split=True),
    }.items()
} | {"bfloat16 rounded logits": Case(20, 61, torch.bfloat16, 0.6, fp32_lm_head=False)}


def compute(case: Case) -> Solution | None:
    """Return this rank's solution of a case; None on rank 1 if the case is not split."""
    rank = dist.get_rank()
    fused_scores._BLOCK_GRADIENTS = 2**26 if case.large_blocks else 17 * 20
    if not case.split:
        return None if rank else case.solve(case.head, "triton")
    rows = case.padded // 2
    shard = case.head._replace(weight=case.head.weight[rank * rows : (rank + 1) * rows])
    return case.solve(shard, "triton", group=dist.group.WORLD, first_row=rank * rows)


def repair_bfloat16() -> None:
    """Give the interpreter bfloat16 arithmetic.

    Triton 3.9's interpreter multiplies the bits of bfloat16 numbers as integers in `dot`, and truncates in conversions
    from float32, which GPUs round.
    """
    dot, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def create_fp_trunc(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return truncate(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = create_dot, create_fp_trunc


def main() -> None:
    """Compute all cases with small tiles, so that every case has several."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    repair_bfloat16()
    fused_scores_triton.tiles_for = lambda dtype, device: fused_scores_triton.Tiles(16, 16, 16, 1, 1)
    fused_scores_triton._TILES_PER_PART, fused_scores_triton._GROUP = 2, 2
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    torch.save({name: compute(case) for name, case in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
