"""Throughput of reward pools, and the share of reward time that generation hides.

    python benchmarks/rewards.py [--samples 400] [--rounds 5] [--workers 2] [--no-run]

The first table shows samples per second for each reward, called in three ways: the bare library in this process (for
`math_rule` math-verify's `parse` and `verify`; for `code_sandbox`, which uses no library, the reward itself), the
reward in this process, and a `RewardPool` with timeouts. Each round times the three in turn on the same samples. Values
are medians; factors are medians of the rounds' ratios. An unknown reward is reported as not installed.

The second table comes from a short training of the embedded task with `math_rule`. It shows, per step, the share of
reward time (seconds that reward processes worked) before the end of generation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Set before any library starts threads, which would take cores from the pool's processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from math_verify import parse, verify

from roll_gspo.config.reward_table import SHIPPED_REWARDS
from roll_gspo.rewards import BatchReward, RewardPool, RewardRequest, reward_spec
from roll_gspo.rewards.spec import build_reward

GROUP = 8
TIMEOUT_S = 60.0
LIBRARY_TIMEOUT_S = 20  # wall time: a busy machine must not fail a sample
FORMS = (
    "So there are {0} of them, and the final answer is \\boxed{{{0}}}.",
    "The final answer is $\\frac{{{1}}}{{2}}$.",
    "Adding both gives {0}. #### {0}",
    "We get $x = {0}$, hence $$x^2 = {2}$$ and the answer is \\boxed{{{0}.0}}.",
    "Let $x$ be the number.\n\\[x + 1 = {3}\\]\nTherefore \\boxed{{x = {0}}}",
    "I am not sure, perhaps \\boxed{{{3}}}.",
    "\\boxed{{\\sqrt{{{2}}}}}",
    "Either \\boxed{{{3}}}, no: \\boxed{{{0}}}",
)
PROGRAM = "```python\nn = int(input())\nprint(sum(i * i for i in range(n + 1)))\n```"
RUN = (
    *("--config-name", "example_gspo", "tracker=none", "validation=null", "warm_start.steps=80", "save_steps=1000"),
    *("rewards.column_addition.worker_cls=math_rule", "run_name=run"),
    # Fewer slots than samples, as in a real run: the engine decodes a part of the samples at a time.
    *("actor_infer.strategy_args.strategy_config.max_num_seqs=16", "rollout_batch_size=64"),
)


class Case(NamedTuple):
    """A reward with samples, and the same work without this package (None if there is no such library)."""

    name: str
    arguments: dict[str, object]
    requests: list[RewardRequest]
    bare: Callable[[RewardRequest], object] | None


def mathematics(num_samples: int) -> list[RewardRequest]:
    """Make right and wrong answers in several forms; `GROUP` samples share a ground truth."""
    numbers = [7 + 3 * (index // GROUP) for index in range(num_samples)]
    return [
        RewardRequest("", FORMS[i % len(FORMS)].format(n, 2 * n, n * n, n + 1), str(n)) for i, n in enumerate(numbers)
    ]


def programs(num_samples: int) -> list[RewardRequest]:
    """Make samples with the same program and three test cases."""
    cases = [
        {"input": f"{n}\n", "output": f"{n * (n + 1) * (2 * n + 1) // 6}\n", "testtype": "stdin"} for n in (1, 9, 40)
    ]
    return [RewardRequest("", PROGRAM, "", {"id": str(i), "test_cases": json.dumps(cases)}) for i in range(num_samples)]


def math_verify_alone(request: RewardRequest) -> object:
    """Call math-verify as in its documentation, with its own timeouts."""
    return verify(
        parse(f"\\boxed{{{request.ground_truth}}}", parsing_timeout=LIBRARY_TIMEOUT_S),
        parse(request.response, parsing_timeout=LIBRARY_TIMEOUT_S),
        timeout_seconds=LIBRARY_TIMEOUT_S,
    )


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(case: Case, num_workers: int, rounds: int) -> None:
    """Measure a reward and print its row."""
    if case.name not in SHIPPED_REWARDS:
        print(f"{case.name:14} not installed (this version has {', '.join(sorted(SHIPPED_REWARDS))})")
        return
    spec = reward_spec(case.name, case.arguments, "rewards.benchmark")
    reward = build_reward(spec)
    assert not isinstance(reward, BatchReward)
    bare = case.bare or reward
    number, times = len(case.requests), []
    with RewardPool(spec, num_workers, TIMEOUT_S, "rewards.benchmark") as pool:
        pool.check()
        pool.score(case.requests[: 8 * num_workers])

        def pooled() -> None:
            failed = [result.failed for result in pool.score(case.requests) if result.failed]
            assert not failed, failed[0]

        for _ in range(rounds):
            alone = seconds(lambda: [bare(request) for request in case.requests])
            called = seconds(lambda: [reward(request) for request in case.requests])
            times.append((alone, called, seconds(pooled)))
    rates = [number / statistics.median(column) for column in zip(*times, strict=True)]
    factors = [statistics.median(row[i] / row[2] for row in times) for i in (0, 1)]
    columns = "  ".join(f"{rate:12,.0f}" for rate in rates)
    print(f"{case.name:14} {columns}  {factors[0]:9.2f}  {factors[1]:11.2f}")


def hidden_shares(num_steps: int, num_workers: int) -> None:
    """Run a short training and print the hidden share of each step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "roll_gspo.run", *RUN, f"max_steps={num_steps}", "output_dir=out"]
        command.append(f"rewards.column_addition.world_size={num_workers}")
        root = Path(__file__).resolve().parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise SystemExit(f"the training failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = (Path(folder) / "out/example_gspo/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    print("\nstep  generate s  score s  reward s  hidden share of reward time")
    for row in rows:
        values = row["time/generate"], row["time/score"], row["reward/seconds"], 100 * row["reward/hidden_share"]
        print("{:4}  {:10.2f}  {:7.3f}  {:8.2f}  {:5.1f} %".format(row["step"], *values))
    print(f"median {100 * statistics.median(row['reward/hidden_share'] for row in rows):.1f} % (goal: 90 %)")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--no-run", action="store_true", help="skip the training")
    arguments = parser.parse_args()
    print(f"{arguments.workers} workers, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'samples/s':14} {'bare':>12}  {'reward':>12}  {'pool':>12}  pool/bare  pool/reward")
    cases = (
        Case("math_rule", {"timeout_s": LIBRARY_TIMEOUT_S}, mathematics(arguments.samples), math_verify_alone),
        Case("code_sandbox", {"time_limit_s": 10, "total_s": 40}, programs(arguments.samples // 4), None),
    )
    for case in cases:
        compare(case, arguments.workers, arguments.rounds)
    if not arguments.no_run:
        hidden_shares(arguments.steps, arguments.workers)


if __name__ == "__main__":
    main()
