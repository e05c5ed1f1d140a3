"""Time of the controller per stage, with responses that a synthetic engine returns at once.

    python benchmarks/controller.py [--samples 512 4096 16384] [--tokens 4096 2048 512] [--group 8]

Stages of a step around the models: collate responses, rewards (one worker that returns at once), training batch, the
part of writing rollouts that the step waits for, that of the background thread, and splitting into micro-batches. The
table shows seconds per step and microseconds per token. Vocabulary and log-probs resemble those of a text model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.batch import LogRolloutsConfig
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.experience import ExperienceSettings, TokenScoring, train_batch
from roll_gspo.pipelines.rlvr.sample_files import SampleFiles
from roll_gspo.pipelines.rlvr.state import RlvrState
from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec

VOCABULARY = 150_000
MICRO_BATCH = 4


class SyntheticEngine:
    """Return responses of half to all of the tokens, with the token frequencies of a text."""

    def __init__(self, num_samples: int, num_tokens: int, group: int) -> None:
        random = np.random.default_rng(0)
        lengths = random.integers(num_tokens // 2, num_tokens + 1, num_samples)
        self.prompts = [
            Prompt(tuple(range(64)), "a prompt", {"id": str(i), "source": "s", "ground_truth": "1"})
            for i in range(num_samples // group)
        ]
        flat = []
        for length in lengths:
            ids = (random.zipf(1.3, length) % VOCABULARY).tolist()
            log_probs = (-random.exponential(0.4, length)).astype(np.float32).tolist()
            flat.append(Completion(tuple(ids), tuple(log_probs), "stop"))
        self.completions = [flat[i : i + group] for i in range(0, num_samples, group)]


class Stages:
    """The seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def decode(ids: object) -> str:
    """Return a text of four characters per token."""
    return "".join(f"{i:04x}" for i in ids)  # type: ignore[attr-defined]


def measure(num_samples: int, num_tokens: int, group: int) -> None:
    """Print the rows of one size."""
    engine, stage = SyntheticEngine(num_samples, num_tokens, group), Stages()
    with stage("collate"):
        rollouts = Rollouts.collate(engine.prompts, engine.completions, 0, 1)
    total = int(rollouts.sequences.response_mask.sum())
    with RewardPool(reward_spec("length", {"max_length": num_tokens}, "rewards.x"), 1, 60, "rewards.x") as pool:
        pool.check()
        text = "word " * num_tokens
        with stage("rewards"):
            results = pool.score([RewardRequest("p", text, "1", {}) for _ in range(num_samples)])
    scores = torch.rand(num_samples, generator=torch.Generator().manual_seed(0)).tolist()
    results = [result.__class__(score) for result, score in zip(results, scores, strict=True)]
    old = rollouts.rollout_log_probs * 1.001
    state = RlvrState(0, PromptSampler(engine.prompts, seed=0), RunningMoments(), None)
    settings = ExperienceSettings(AdvantageSettings("grpo"), SampleMaskSettings(), num_tokens)
    with stage("training batch"):
        collected = Collected(rollouts, tuple(results), {})
        batch, _ = train_batch(collected, TokenScoring(old), settings, state)
    with tempfile.TemporaryDirectory() as folder:
        files = SampleFiles(Path(folder), decode, 1, LogRolloutsConfig(), 1)
        with stage("rollout files, step waits"):
            files.write_rollouts(1, rollouts, ["x"] * num_samples, results, batch)
        with stage("rollout files, background"):
            files.flush()
        files.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    with stage("micro-batches"):
        batch.split(MICRO_BATCH)
    for name, seconds in stage.seconds.items():
        print(f"| {num_samples:,} × {num_tokens:,} | {name} | {seconds:.2f} | {1e6 * seconds / total:.3f} |")
    print(
        f"| {num_samples:,} × {num_tokens:,} | rollout file | {size / 1e6:.0f} MB | {size / total:.1f} B |", flush=True
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 2048, 512], help="of each number of samples")
    parser.add_argument("--group", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| samples × tokens | stage | s per step | µs per token |\n|---|---|---|---|")
    for num_samples, num_tokens in zip(arguments.samples, arguments.tokens, strict=True):
        measure(num_samples, num_tokens, arguments.group)


if __name__ == "__main__":
    main()
