"""Streams of groups with deterministic engines and rewards, whose order of arrival is random."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from counting_engine import RandomEngine

from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.batch import Completion, Prompt
from roll_gspo.data.sampler import InterleavedSampler, PromptSampler, Sampler
from roll_gspo.data.templates import ChatFormat
from roll_gspo.models.tiny import byte_tokenizer
from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.pipelines.rlvr.request_sources import Episodes
from roll_gspo.pipelines.rlvr.rollout_state import load_groups, save_groups, snapshot
from roll_gspo.pipelines.rlvr.rollout_stream import RolloutStream
from roll_gspo.pipelines.rlvr.stream_settings import StreamSettings
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.job import RewardTime
from roll_gspo.roles.environment_manager import EnvironmentManager
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.strategies.base import GenerationRequest, Sampling

DOMAINS = ("even", "odd")
FILTERS = dict.fromkeys(DOMAINS, QueryFilterSettings("std_filter"))  # drops groups with equal scores
REJECT_ALL = dict.fromkeys(DOMAINS, QueryFilterSettings("mean_filter", threshold_down=2.0, threshold_up=3.0))
SAMPLING = Sampling(num_samples=3, max_new_tokens=5)
PROMPTS = tuple(
    Prompt((1 + number, 2), f"prompt {number}", {"domain": DOMAINS[number % 2], "ground_truth": "", "id": number})
    for number in range(11)
)
MAX_PUMPS = 5000


def text_of(completion: Completion) -> str:
    return str(completion.token_ids)


def score_of(response: str) -> RewardResult:
    """Return a score of 0 or 1; every seventh reward fails."""
    number = zlib.crc32(response.encode())
    if number % 7 == 0:
        return RewardResult(0.0, failed="ValueError: no opinion", traceback="line 1")
    return RewardResult(float(number % 2), answer=response[:5], components={"part": number % 5 / 3})


class RandomScoring:
    """Stand-in of `Scoring` without processes: results arrive late, in an order that depends on a seed."""

    def __init__(self, order: int) -> None:
        self._random = random.Random(order)
        self._waiting: dict[int, RewardResult] = {}
        self.time = RewardTime(0.0, 0.0)

    def __enter__(self) -> RandomScoring:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()

    def submit(self, index: int, domain: str, request: RewardRequest) -> None:
        self._waiting[index] = score_of(request.response)

    def take_finished(self, timeout_s: float = 0.0) -> list[tuple[int, RewardResult]]:
        taken = [index for index in self._waiting if self._random.random() < 0.4]
        self._random.shuffle(taken)
        return [(index, self._waiting.pop(index)) for index in taken]

    def next_step(self) -> None: ...


class RandomRewards:
    """Stand-in of `RewardManager` that opens `RandomScoring`."""

    domain_names = DOMAINS

    def __init__(self, order: int) -> None:
        self._order = order

    def domains(self, prompts: Iterable[Prompt]) -> list[str]:
        return [prompt.row["domain"] for prompt in prompts]

    environment_time = None

    def result(self, completion: Completion) -> None:
        return None

    def request(self, prompt: Prompt, response: str) -> tuple[str, RewardRequest]:
        return prompt.row["domain"], RewardRequest(prompt.text, response, "", {})

    def open(self) -> RandomScoring:
        return RandomScoring(self._order)


def new_sampler(interleaved: bool = False) -> Sampler[Prompt]:
    if not interleaved:
        return PromptSampler(PROMPTS, seed=3)
    items = {domain: PROMPTS[number::2] for number, domain in enumerate(DOMAINS)}
    return InterleavedSampler(items, {"even": 0.7, "odd": 0.3}, seed=3)


def completion_state(completion: Completion) -> tuple[Any, ...]:
    experts = completion.routed_experts
    routed = None if experts is None else (experts.dtype, experts.tolist())
    plain = (completion.token_ids, completion.log_probs, completion.finish_reason, completion.version_runs)
    return *plain, routed, completion.episode


def group_state(group: Group) -> tuple[Any, ...]:
    """Return everything of a group that training can see."""
    completions = {sample: completion_state(completion) for sample, completion in sorted(group.completions.items())}
    return group.prompt, group.domain, group.draw, group.seeds, group.is_filler, completions, dict(group.results)


@dataclass
class Batch:
    """A trained batch: its step, groups and dropped groups, and their states."""

    step: int
    groups: list[Group]
    dropped: list[Group]
    states: list[tuple[Any, ...]] = field(init=False)
    dropped_states: list[tuple[Any, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.states = [group_state(group) for group in self.groups]
        self.dropped_states = sorted((group_state(group) for group in self.dropped), key=lambda state: state[2])

    @property
    def requests(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(group.prompt.text, group.seeds) for group in self.groups]

    @property
    def versions(self) -> set[int]:
        completions = (completion for group in self.groups for completion in group.completions.values())
        return {version for completion in completions for version, _ in completion.version_runs}


class Run:
    """A trainer without a model that trains the batches of a stream.

    Args:
        settings: settings of the stream.
        order: seed of the order in which responses and scores arrive. It has no influence on them.
        interleaved: batches have shares of the domains.
        records_experts: completions hold routed experts.
        capacity: number of requests that the engine decodes.
        environments: plays the samples as episodes, instead of rewards for single responses.
    """

    def __init__(
        self,
        settings: StreamSettings,
        order: int = 0,
        interleaved: bool = False,
        records_experts: bool = False,
        capacity: int = 16,
        environments: EnvironmentManager | None = None,
    ) -> None:
        self.random = random.Random(order)
        self.sampler = new_sampler(interleaved)
        self.engine = RandomEngine(order, capacity, records_experts)
        self.generator = Generator(self.engine, 0, 0, LocalStream(self.engine))
        self.rewards = cast(Any, environments or RandomRewards(order))
        source = None
        if environments is not None:
            self.engine.letters = True
            arguments = self.generator, byte_tokenizer(), ChatFormat(), settings.sampling
            source = Episodes(environments, partial(environments.play, *arguments, validation=False))
        self._pump_s = 0.0 if source is None else 0.002
        self.stream = RolloutStream(self.sampler, self.generator, self.rewards, text_of, settings, source)
        self.step = 0
        self.at_pump: Callable[[], None] = lambda: None
        self._other = self.generator.open_stream()
        self._other.submit([GenerationRequest(0, (1,), Sampling(1, 10**9), 0)])

    def pump(self) -> None:
        self.stream.pump(self._pump_s)
        self.at_pump()

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(MAX_PUMPS):
            if condition():
                return
            self.pump()
        raise AssertionError("no progress")

    def decode_for_another_client(self) -> None:
        """Let requests of the stream end without their responses being taken."""
        self._other.poll(0.0)

    def train(self) -> Batch:
        """Train one step, with some progress of the stream meanwhile."""
        stream = self.stream
        self.wait(stream.has_batch)
        found = stream.next_batch()
        assert found is not None
        batch = Batch(self.step + 1, found.groups, found.dropped)
        at_pump, self.at_pump = self.at_pump, lambda: None  # no checkpoint is written within a step
        for _ in range(self.random.randrange(4)):
            self.pump()
        self.wait(stream.can_change_weights)
        self.decode_for_another_client()
        self.step += 1
        with stream.changing_weights():
            self.generator.update_weights(cast(Any, None), self.step)
        stream.trained(batch.groups)
        self.at_pump = at_pump
        return batch

    def train_all(self) -> list[Batch]:
        """Train all steps that are left."""
        return [self.train() for _ in range(self.step, self.stream.settings.num_steps)]

    def save(self, folder: Path) -> None:
        folder.mkdir()
        with self.stream.lock:
            (folder / "state.json").write_text(json.dumps([self.step, snapshot(self.stream).sampler]))
            save_groups(self.stream, folder)

    def load(self, folder: Path) -> None:
        self.step, sampler = json.loads((folder / "state.json").read_text())
        self.sampler.load_state_dict(sampler)
        load_groups(self.stream, folder, self.step)
        self.generator.update_weights(cast(Any, None), self.step)


def stream_settings(
    max_staleness: int = 1, num_steps: int = 5, groups_per_step: int = 4, **other: Any
) -> StreamSettings:
    return StreamSettings(
        sampling=SAMPLING,
        groups_per_step=groups_per_step,
        num_steps=num_steps,
        max_staleness=max_staleness,
        **other,
    )


def states(batches: Sequence[Batch]) -> list[tuple[Any, Any]]:
    return [(batch.states, batch.dropped_states) for batch in batches]
