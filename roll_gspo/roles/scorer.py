"""The role `rewards`: what gives each response its reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.environments.pool import EnvironmentTime
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.routing import Router
from roll_gspo.roles.scoring import Scoring


class Scorer(ABC):
    """Gives responses their rewards: the reward workers, or the environments in which they were sampled.

    Args:
        tags: tags of the rows of each domain.
        key: key of the blocks of the domains.
    """

    def __init__(self, tags: Mapping[str, Sequence[str]], key: str = "rewards") -> None:
        self._router = Router(tags, key)
        self.domain_names = list(tags)

    def domains(self, prompts: Iterable[Prompt]) -> list[str]:
        """Return the domain of each prompt."""
        return [self._router.domain_of(prompt.row) for prompt in prompts]

    @abstractmethod
    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Check that every row has a domain, and that each domain works with its first row."""

    @abstractmethod
    def open(self) -> Scoring:
        """Return a context that scores samples as soon as they are generated."""

    @abstractmethod
    def request(self, prompt: Prompt, response: str) -> tuple[str, RewardRequest]:
        """Return the domain of a sample and the request for its reward."""

    @abstractmethod
    def result(self, completion: Completion) -> RewardResult | None:
        """Return the reward that a response already has, or None if `open` scores it."""

    @property
    def environment_time(self) -> EnvironmentTime | None:
        """Time that environments took for training episodes, or None without environments."""
        return None

    @abstractmethod
    def score(
        self, rollouts: Rollouts, responses: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[RewardResult]:
        """Return one result per sample, in order; `responses` are the texts that rewards score."""

    @abstractmethod
    def close(self) -> None:
        """End the processes."""
