"""Time of the controller per stage, with responses that a synthetic engine returns at once.

    python benchmarks/controller.py [--samples 512 4096 16384] [--tokens 4096 2048 512] [--group 8] [--burst 16]

Stages of a step around the models. First the parts alone: the scheduler, the request stream, the rewards (one worker
that returns at once). Then whole groups in each mode, which contain these parts: draw, submit, take responses, score,
choose the batch. Last what follows: collate, training batch, the part of writing rollouts that the step waits for, that
of the background thread, splitting into micro-batches, and a checkpoint of the groups in flight of one batch.

The table shows wall and CPU seconds of the controller per step, and CPU microseconds per token. Wall time contains
waiting for the reward worker. Vocabulary and log-probs resemble those of a text model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.batch import LogRolloutsConfig
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.experience import ExperienceSettings, TokenScoring, train_batch
from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.pipelines.rlvr.rollout_state import load_groups, save_groups
from roll_gspo.pipelines.rlvr.rollout_stream import RolloutStream
from roll_gspo.pipelines.rlvr.sample_files import SampleFiles
from roll_gspo.pipelines.rlvr.state import RlvrState
from roll_gspo.pipelines.rlvr.stream_settings import StreamSettings
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.roles.reward_manager import RewardManager
from roll_gspo.scheduling.staleness import StalenessScheduler
from roll_gspo.strategies.base import (
    FinishedRequest,
    GenerationRequest,
    SampleFinished,
    Sampling,
    WeightSource,
)

VOCABULARY = 150_000
MICRO_BATCH = 4
MODES = {"synchronous": (0, False), "one_step_off, ratio 1": (1, False), "in_flight, ratio 2": (2, True)}


class SyntheticEngine:
    """Return responses of half to all of the tokens, with the token frequencies of a text.

    Args:
        num_samples: number of different responses.
        num_tokens: tokens of the longest response.
        burst: responses per call of `advance`.
    """

    def __init__(self, num_samples: int, num_tokens: int, burst: int) -> None:
        random = np.random.default_rng(0)
        self.completions: list[Completion] = []
        for length in random.integers(num_tokens // 2, num_tokens + 1, num_samples):
            ids = (random.zipf(1.3, length) % VOCABULARY).tolist()
            log_probs = (-random.exponential(0.4, length)).astype(np.float32).tolist()
            self.completions.append(Completion(tuple(ids), tuple(log_probs), "stop", None, ((0, int(length)),)))
        self.capacity, self._burst = num_samples, burst
        self._outstanding: deque[GenerationRequest] = deque()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests."""
        self._outstanding += requests

    def advance(self, seconds: float) -> list[FinishedRequest]:
        """Return the next responses."""
        requests = [self._outstanding.popleft() for _ in range(min(self._burst, len(self._outstanding)))]
        return [FinishedRequest(r.key, self.completions[r.seed % len(self.completions)]) for r in requests]

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests."""
        removed = set(keys)
        self._outstanding = deque(request for request in self._outstanding if request.key not in removed)
        return []

    def partials(self) -> list[FinishedRequest]:
        """Return nothing: a response exists only once it is complete."""
        return []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: object = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        """Return whole groups."""
        size = len(self.completions)
        return [[self.completions[(seed + j) % size] for j in range(sampling.num_samples)] for seed in seeds]

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Do nothing: there are no weights."""

    def shutdown(self) -> None:
        """Do nothing."""


class Case(NamedTuple):
    """Sizes and components of a measurement."""

    num_samples: int
    num_tokens: int
    group: int
    engine: SyntheticEngine
    rewards: RewardManager
    prompts: list[Prompt]

    def text_of(self, completion: Completion) -> str:
        """Return a text of four characters per token."""
        return "word" * len(completion.token_ids)

    def stream(self, ratio: int, in_flight: bool) -> RolloutStream:
        """Return an empty stream of groups."""
        generator = Generator(self.engine, 0, 0, LocalStream(self.engine))
        settings = StreamSettings(
            sampling=Sampling(self.group, self.num_tokens),
            groups_per_step=self.num_samples // self.group,
            num_steps=10**6,
            max_staleness=ratio,
            in_flight=in_flight,
        )
        return RolloutStream(PromptSampler(self.prompts, seed=0), generator, self.rewards, self.text_of, settings)


class Stages:
    """The (wall, CPU) seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - started, time.process_time() - cpu


def decode(ids: object) -> str:
    """Return a text of four characters per token."""
    return "".join(f"{i:04x}" for i in ids)  # type: ignore[attr-defined]


def measure_parts(case: Case, stage: Stages) -> None:
    """Time the scheduler, the request stream and the rewards alone."""
    size = case.num_samples // case.group
    scheduler = StalenessScheduler(size, 2, in_order=False)
    for _ in range(2):  # the second step begins with full queues
        for _ in range(scheduler.num_startable()):
            scheduler.finish(scheduler.start())
        with stage("scheduler"):
            chosen = scheduler.batch()
            assert chosen is not None
            scheduler.train(chosen)
            for _ in range(scheduler.num_startable()):
                scheduler.finish(scheduler.start())
    client = LocalStream(case.engine).open()
    sampling = Sampling(1, case.num_tokens)
    requests = [
        GenerationRequest(i, case.prompts[i // case.group].token_ids, sampling, i) for i in range(case.num_samples)
    ]
    with stage("request stream"):
        client.submit(requests)
        while client.outstanding:
            client.poll(0.1)
    with stage("rewards"), case.rewards.open() as scoring:
        for index, request in enumerate(requests):
            prompt, completion = case.prompts[index // case.group], case.engine.completions[request.key]
            scoring.submit(index, *case.rewards.request(prompt, case.text_of(completion)))
        left = case.num_samples
        while left:
            left -= len(scoring.take_finished(0.1))


def measure_groups(case: Case, stage: Stages) -> list[Group]:
    """Time a step of groups in every mode, and a checkpoint; return the groups of a batch."""
    groups: list[Group] = []
    for mode, (ratio, in_flight) in MODES.items():
        stream = case.stream(ratio, in_flight)
        fill(stream)
        with stage(f"groups, {mode}"):
            batch = stream.next_batch()
            assert batch is not None
            groups = batch.groups
            stream.trained(groups)
            fill(stream)
        if ratio == 1:
            batch = stream.next_batch()
            assert batch is not None
            stream.trained(batch.groups)
            checkpoint(case, stream, stage)
        stream.close()
    return groups


def fill(stream: RolloutStream) -> None:
    """Generate and score until no group may start."""
    ready = False
    while stream.num_generating or stream.num_scoring or stream.can_start():
        stream.pump(0.1)
        ready = ready or stream.has_batch()  # a step that waits asks after every pump
        _ = stream.num_ready


def checkpoint(case: Case, stream: RolloutStream, stage: Stages) -> None:
    """Time a checkpoint of the groups in flight, one batch."""
    with tempfile.TemporaryDirectory() as folder:
        with stage("checkpoint of a batch, save"):
            save_groups(stream, Path(folder))
        loaded = case.stream(1, False)
        with stage("checkpoint of a batch, load"):
            load_groups(loaded, Path(folder), 1)
        assert loaded.num_ready == stream.num_ready == (case.num_samples, case.num_samples)


def measure(case: Case) -> None:
    """Print the rows of one size."""
    stage = Stages()
    measure_parts(case, stage)
    groups = measure_groups(case, stage)
    results = [result for group in groups for result in group.ordered_results]
    with stage("collate"):
        rollouts = Rollouts.collate([g.prompt for g in groups], [g.ordered_completions for g in groups], 0, 1)
    total = int(rollouts.sequences.response_mask.sum())
    scores = torch.rand(case.num_samples, generator=torch.Generator().manual_seed(0)).tolist()
    results = [result.__class__(score) for result, score in zip(results, scores, strict=True)]
    old = rollouts.rollout_log_probs * 1.001
    state = RlvrState(0, PromptSampler(case.prompts, seed=0), RunningMoments(), None)
    settings = ExperienceSettings(AdvantageSettings("grpo"), SampleMaskSettings(), case.num_tokens)
    with stage("training batch"):
        collected = Collected(rollouts, tuple(results), {})
        batch, _ = train_batch(collected, TokenScoring(old), settings, state)
    with tempfile.TemporaryDirectory() as folder:
        files = SampleFiles(Path(folder), decode, 1, LogRolloutsConfig(), 1)
        with stage("rollout files, step waits"):
            files.write_rollouts(1, rollouts, ["x"] * case.num_samples, results, batch, 1)
        with stage("rollout files, background"):
            files.flush()
        files.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    with stage("micro-batches"):
        batch.split(MICRO_BATCH)
    sizes = f"{case.num_samples:,} × {case.num_tokens:,}"
    for name, (wall, cpu) in stage.seconds.items():
        print(f"| {sizes} | {name} | {wall:.2f} | {cpu:.2f} | {1e6 * cpu / total:.3f} |")
    print(f"| {sizes} | rollout file | {size / 1e6:.0f} MB | | {size / total:.1f} B |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 2048, 512], help="of each number of samples")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--burst", type=int, default=16, help="responses that end at the same time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| samples × tokens | stage | s per step | CPU s | CPU µs per token |\n|---|---|---|---|---|")
    for num_samples, num_tokens in zip(arguments.samples, arguments.tokens, strict=True):
        block = RewardConfig(worker_cls="length", worker_args={"max_length": num_tokens}, world_size=1)
        rewards = RewardManager({"x": block})
        prompts = [
            Prompt(tuple(range(64)), "a prompt", {"id": str(i), "domain": "x", "tag": "", "ground_truth": "1"})
            for i in range(num_samples // arguments.group)
        ]
        rewards.check([prompts[0].row])
        engine = SyntheticEngine(num_samples, num_tokens, arguments.burst)
        measure(Case(num_samples, num_tokens, arguments.group, engine, rewards, prompts))
        rewards.close()


if __name__ == "__main__":
    main()
