"""The environments of a run: their processes, the episodes that are played in them, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.templates import ChatFormat
from roll_gspo.environments.pool import EnvironmentPool, EnvironmentTime
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.roles.episodes import EpisodeClient, EpisodeLimits, EpisodeRequest
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.scorer import Scorer
from roll_gspo.roles.scoring import Scoring
from roll_gspo.strategies.base import Sampling

_SLICE_S = 0.25


@dataclass(frozen=True)
class EnvironmentSettings:
    """Settings of one environment.

    Attributes:
        spec: its class and arguments.
        tags: tags of the rows that it plays.
        limits: limits of an episode in training.
        validation_limits: limits of an episode in validation.
        num_workers, validation_workers: number of processes.
        episodes_per_worker, validation_episodes_per_worker: episodes that a process plays at the same time.
        timeout_s: seconds per turn of the environment.
        start_timeout_s: seconds to start a process.
        max_memory_mb: memory limit of a process in MiB, or None.
    """

    spec: EnvironmentSpec
    tags: tuple[str, ...]
    limits: EpisodeLimits
    validation_limits: EpisodeLimits
    num_workers: int
    validation_workers: int
    episodes_per_worker: int
    validation_episodes_per_worker: int
    timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    max_memory_mb: int | None = None


class EnvironmentManager(Scorer):
    """Owns the processes of every environment. A response that is an episode has the reward of its environment.

    Training and validation have different processes, which start with their first episodes.

    Args:
        environments: settings by block of `custom_envs`.
        format_penalty: added to the reward of every answer that the environment could not understand.
        validation_format_penalty: the same in validation.
    """

    def __init__(
        self,
        environments: Mapping[str, EnvironmentSettings],
        format_penalty: float = 0.0,
        validation_format_penalty: float = 0.0,
    ) -> None:
        super().__init__({name: settings.tags for name, settings in environments.items()}, "custom_envs")
        self._settings = environments
        self._client: EpisodeClient | None = None
        self._penalty = format_penalty
        self._validation_penalty = validation_format_penalty
        self._pools = {name: _pool(name, s, validation=False) for name, s in environments.items()}
        self._validation_pools = {name: _pool(name, s, validation=True) for name, s in environments.items()}

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Check that every row has an environment, and that each environment begins an episode of its first row.

        Raises:
            DataError: a row matches no block.
            ConfigError, MissingDependencyError, PlayError: an environment cannot be built, or does not begin.
        """
        columns = list(rows)
        self._router.check(columns)
        first = {self._router.domain_of(row): row for row in reversed(columns)}
        for name, row in first.items():
            settings = self._settings[name]
            self._pools[name].check(row, settings.start_timeout_s + settings.timeout_s)

    @property
    def environment_time(self) -> EnvironmentTime:
        """Time that environments took for training episodes."""
        return EnvironmentTime(0.0, 0.0) if self._client is None else self._client.time

    def play(
        self, generator: Generator, tokenizer: Any, chat: ChatFormat, sampling: Sampling, *, validation: bool
    ) -> EpisodeClient:
        """Return a client that plays episodes with the engines of `generator`.

        Args:
            generator: the engines.
            tokenizer: tokenizer of the model.
            chat: chat template and system prompts.
            sampling: sampling of an answer.
            validation: the episodes are of the validation, whose requests go first.
        """
        pools = self._validation_pools if validation else self._pools
        limits = {n: s.validation_limits if validation else s.limits for n, s in self._settings.items()}
        penalty = self._validation_penalty if validation else self._penalty
        client = EpisodeClient(generator.open_stream(validation), pools, limits, tokenizer, chat, sampling, penalty)
        if not validation:
            self._client = client
        return client

    def episode(self, key: int, prompt: Prompt, seed: int, row_seed: int) -> EpisodeRequest:
        """Return the request for an episode of a row.

        Args:
            key: number of the episode.
            prompt: the row.
            seed: seed of the sampling.
            row_seed: seed of the environment, unless the row has a column `seed`.
        """
        row = prompt.row
        environment_seed = int(row["seed"]) if isinstance(row.get("seed"), int) else row_seed
        return EpisodeRequest(key, prompt.token_ids, self._router.domain_of(row), row, environment_seed, seed)

    def open(self) -> Scoring:
        """Return a context without reward workers."""
        return Scoring({})

    def request(self, prompt: Prompt, response: str) -> tuple[str, RewardRequest]:
        """Raise `RuntimeError`: no worker scores an episode."""
        raise RuntimeError("custom_envs: an episode has its reward from its environment")

    def result(self, completion: Completion) -> RewardResult:
        """Return the reward of a training episode."""
        return episode_result(completion)

    def score(
        self, rollouts: Rollouts, responses: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[RewardResult]:
        """Return the rewards of validation episodes."""
        return [episode_result(completion) for completion in rollouts.completions]

    def close(self) -> None:
        """End the processes."""
        for pool in (*self._pools.values(), *self._validation_pools.values()):
            pool.close()


def episode_result(completion: Completion) -> RewardResult:
    """Return the reward of an episode: the sum over its turns."""
    episode = completion.episode
    assert episode is not None
    if episode.failed is not None:
        return RewardResult(0.0, failed=episode.failed, traceback=episode.traceback)
    return RewardResult(episode.reward)


class EpisodePlayer:
    """Plays one episode for each sample of a batch of prompts, in the place of a generation engine.

    Args:
        generator: the engines.
        open_client: returns a client that plays episodes.
        manager: the environments.
    """

    def __init__(
        self, generator: Generator, open_client: Callable[[], EpisodeClient], manager: EnvironmentManager
    ) -> None:
        self._generator = generator
        self._open_client = open_client
        self._manager = manager

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        purpose: str,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
    ) -> Rollouts:
        """Play `sampling.num_samples` episodes per prompt; see `Generator.generate`."""
        size = sampling.num_samples
        requests = []
        for number, prompt in enumerate(prompts):
            seeds = self._generator.seeds(purpose, first + number, size)
            requests += [
                self._manager.episode(number * size + i, prompt, seed, seeds[0]) for i, seed in enumerate(seeds)
            ]
        client, finished = self._open_client(), dict[int, Completion]()
        try:
            client.submit(requests)
            while len(finished) < len(requests):
                finished |= dict(client.poll(_SLICE_S))
                if progress is not None:
                    progress(len(finished), len(requests))
        finally:
            client.close()
        groups = [[finished[number * size + i] for i in range(size)] for number in range(len(prompts))]
        return self._generator.collate(prompts, groups)


def _pool(name: str, settings: EnvironmentSettings, *, validation: bool) -> EnvironmentPool:
    workers = settings.validation_workers if validation else settings.num_workers
    episodes = settings.validation_episodes_per_worker if validation else settings.episodes_per_worker
    return EnvironmentPool(
        *(settings.spec, workers, episodes, settings.timeout_s, f"custom_envs.{name}"),
        start_timeout_s=settings.start_timeout_s,
        max_memory_mb=settings.max_memory_mb,
    )
