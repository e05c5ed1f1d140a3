"""Time and memory of losses and estimators, in passes of one `exp` and in input tensors.

    python benchmarks/algorithms.py [--shape 512 4096] [--rounds 15] [--threads 1] [--holes] [--only clip gae ...]

Rows: every valid pair of `importance_sampling` and `policy_loss` through `policy_loss()` with its metrics and the
backward pass to the log-probabilities, the value loss with its backward pass, and every `adv_estimator` through
`advantages()` with its statistics.

Time is CPU time of the process, which other work on the machine hardly affects; wall time would favour the shorter
call. In each round a row is timed right after `exp` over a tensor of the same shape. The multiple is the median of the
rounds' ratios.

Memory is the peak allocated during a call beyond the start, gradient included, divided by the size of one float32
input. It comes from the allocations and frees of torch's CPU allocator that `torch.profiler` records. The process keeps
freed memory (mallopt), like a training process that has warmed up. Otherwise the benchmark would measure page faults.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from roll_gspo.algorithms.advantage import advantages
from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import policy_loss
from roll_gspo.algorithms.value_loss import ValueLossSettings, value_loss
from roll_gspo.batch import Sequences, TrainBatch
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, RATIOS

GOAL = 12.0
GROUP = 8
TURN = 100


class Row(NamedTuple):
    """One row of the table."""

    name: str
    call: Callable[[], object]


class Cost(NamedTuple):
    """Medians: CPU time per call in microseconds and `exp` passes, time of `exp`, peak memory in input tensors."""

    microseconds: float
    passes: float
    exp_microseconds: float
    memory: float


class Problem:
    """Tensors [B, T] of a mini-batch with lengths from T / 2 to T; `holes` masks every fifth run of `TURN` tokens."""

    def __init__(self, batch: int, width: int, holes: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        lengths = torch.randint(max(width // 2, 1), width + 1, (batch, 1), generator=generator)
        self.mask = torch.arange(width) < lengths
        if holes:
            self.mask &= (torch.arange(width) + lengths) // TURN % 5 != 4
        self.old = -normal(batch, width).abs()
        self.log_probs = (self.old + 0.02 * normal(batch, width)).requires_grad_()
        self.values = normal(batch, width).requires_grad_()
        self.scores = (normal(batch) > 0).float()
        self.groups = torch.arange(batch) // GROUP
        sequences = Sequences(torch.zeros(batch, width + 1, dtype=torch.int64), torch.ones(batch).long(), self.mask)
        self.batch = TrainBatch(
            sequences=sequences,
            sample_ids=torch.arange(batch),
            advantages=normal(batch, 1).expand(batch, width).contiguous(),
            old_log_probs=self.old,
            rollout_log_probs=self.old,
            values=self.values.detach() + 0.1 * normal(batch, width),
            returns=normal(batch, width),
        )
        self.denominators = Denominators.of(self.mask)

    def policy(self, chosen: PolicyLossSettings) -> None:
        """Compute loss, metrics and the gradient of the log-probabilities."""
        self.log_probs.grad = None
        policy_loss(self.log_probs, None, self.batch, self.denominators, chosen)[0].backward()
        self.log_probs.grad = None

    def value(self, chosen: ValueLossSettings) -> None:
        """Compute loss, metrics and the gradient of the values."""
        self.values.grad = None
        value_loss(self.values, self.batch, self.denominators, chosen)[0].backward()
        self.values.grad = None

    def advantages(self, chosen: AdvantageSettings) -> None:
        """Compute advantages of a whole rollout of this shape."""
        advantages(
            self.scores,
            self.groups,
            self.mask,
            chosen,
            log_probs=self.old,
            ref_log_probs=self.batch.returns,
            kl_coef=0.1,
            values=self.batch.values,
        )


def policy_settings(importance_sampling: str, objective: str, width: int) -> PolicyLossSettings | None:
    """Return the settings of a pair with its clip range, None if the two cannot be combined."""
    declared = POLICY_LOSSES.declaration(objective)
    if declared.own_ratio and importance_sampling != "token":
        return None
    clip = (3e-4, 4e-4) if importance_sampling.startswith("seq") else (0.2, 0.27)
    low, high = clip if declared.needs_clip_range else (None, None)
    return PolicyLossSettings(importance_sampling, low, high, None, "seq-mean-token-mean", width, policy_loss=objective)


def rows(problem: Problem) -> Iterator[Row]:
    """Yield every row of the table."""
    width = problem.mask.shape[1]
    for objective in POLICY_LOSSES:
        for importance_sampling in RATIOS:
            chosen = policy_settings(importance_sampling, objective, width)
            if chosen is not None:
                yield Row(f"{objective} / {importance_sampling}", partial(problem.policy, chosen))
    for clip in (None, 0.2):
        yield Row(f"value loss / value_clip {clip}", partial(problem.value, ValueLossSettings(clip)))
    for estimator in ADVANTAGE_ESTIMATORS:
        yield Row(estimator, partial(problem.advantages, AdvantageSettings(estimator)))
    for name, chosen in {
        "reinforce / gamma 0.99": AdvantageSettings("reinforce", gamma=0.99),
        "reinforce / token-level KL": AdvantageSettings("reinforce", add_token_level_kl=True),
        "grpo / whitened": AdvantageSettings("grpo", whiten_advantages=True),
        "gae / gamma 0.99, whitened": AdvantageSettings("gae", gamma=0.99, whiten_advantages=True),
    }.items():
        yield Row(name, partial(problem.advantages, chosen))


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of one call, all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak bytes of torch's CPU allocator during the call, beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for *_, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def measure(table: list[Row], problem: Problem, rounds: int) -> dict[str, Cost]:
    """Measure all rows in every round; the first round warms up and is not counted."""
    source = problem.old
    times: dict[str, list[tuple[float, float, float]]] = {row.name: [] for row in table}
    for number in range(rounds + 1):
        for row in table:
            one_pass = statistics.median(seconds(source.exp) for _ in range(3))
            taken = seconds(row.call)
            if number:
                times[row.name].append((1e6 * taken, taken / one_pass, 1e6 * one_pass))
    size = source.numel() * source.element_size()
    costs = {}
    for row in table:
        taken, passes, one_pass = (statistics.median(column) for column in zip(*times[row.name], strict=True))
        costs[row.name] = Cost(taken, passes, one_pass, peak_bytes(row.call) / size)
    return costs


def keep_freed_memory() -> None:
    """Ask glibc not to return freed memory to the system; no-op on other systems."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 4096), metavar=("B", "T"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--holes", action="store_true", help="masks with gaps, as in multi-turn responses")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name contains one of these")
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs every start and stop
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    batch, width = arguments.shape
    problem = Problem(batch, width, arguments.holes)
    table = [r for r in rows(problem) if not arguments.only or any(part in r.name for part in arguments.only)]
    costs = measure(table, problem, arguments.rounds)
    exp = statistics.median(cost.exp_microseconds for cost in costs.values())
    print(
        f"{list(arguments.shape)} float32, {arguments.threads} thread(s), {arguments.rounds} rounds; exp {exp:.0f} µs\n"
    )
    print(f"| {'what':34} | {'CPU µs':>8} | {'× exp':>6} | {'peak memory × input':>19} |")
    print(f"|{'-' * 36}|{'-' * 9}:|{'-' * 7}:|{'-' * 20}:|")
    for name, cost in costs.items():
        flag = " over the goal" if cost.passes > GOAL else ""
        print(f"| {name:34} | {cost.microseconds:8.0f} | {cost.passes:6.1f} | {cost.memory:19.1f} |{flag}")


if __name__ == "__main__":
    main()
