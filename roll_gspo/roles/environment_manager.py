"""The environments of a run: their processes, and the episodes that are played in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from roll_gspo.data.templates import ChatFormat
from roll_gspo.environments.pool import EnvironmentPool, EnvironmentTime
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.roles.episode_manager import EpisodeManager
from roll_gspo.roles.episodes import EpisodeClient, EpisodeLimits
from roll_gspo.roles.generator import Generator
from roll_gspo.strategies.base import Sampling


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


class EnvironmentManager(EpisodeManager):
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
        tags = {name: settings.tags for name, settings in environments.items()}
        super().__init__(tags, "custom_envs")
        self._settings = environments
        self._penalty = format_penalty
        self._validation_penalty = validation_format_penalty
        self._client: EpisodeClient | None = None
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
        """Return a client that plays episodes in the environments."""
        pools = self._validation_pools if validation else self._pools
        limits = {n: s.validation_limits if validation else s.limits for n, s in self._settings.items()}
        penalty = self._validation_penalty if validation else self._penalty
        client = EpisodeClient(generator.open_stream(validation), pools, limits, tokenizer, chat, sampling, penalty)
        if not validation:
            self._client = client
        return client

    def close(self) -> None:
        """End the processes."""
        for pool in (*self._pools.values(), *self._validation_pools.values()):
            pool.close()


def _pool(name: str, settings: EnvironmentSettings, *, validation: bool) -> EnvironmentPool:
    workers = settings.validation_workers if validation else settings.num_workers
    episodes = settings.validation_episodes_per_worker if validation else settings.episodes_per_worker
    return EnvironmentPool(
        *(settings.spec, workers, episodes, settings.timeout_s, f"custom_envs.{name}"),
        start_timeout_s=settings.start_timeout_s,
        max_memory_mb=settings.max_memory_mb,
    )
