"""The reward manager: sends samples to the reward workers of their domains and collects scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from roll_gspo.batch import Prompt, Rollouts
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.llm_judge.server import JudgeServers
from roll_gspo.rewards.pool import RewardPool
from roll_gspo.rewards.routing import Router
from roll_gspo.roles.scoring import Scoring

COLUMNS_OF_REQUEST = ("ground_truth",)


class RewardManager:
    """The role `rewards`: owns the reward workers of every domain.

    Args:
        config: reward blocks by domain.
    """

    def __init__(self, config: Mapping[str, RewardConfig]) -> None:
        self._router = Router({domain: block.tag_included for domain, block in config.items()})
        self._servers = JudgeServers()
        self._pools = {
            domain: RewardPool(
                self._servers.resolve(spec_from_config(block, f"rewards.{domain}"), f"rewards.{domain}"),
                block.num_workers,
                block.timeout_s,
                f"rewards.{domain}",
                block.start_timeout_s,
                max_batch=block.infer_batch_size,
                max_memory_mb=block.max_memory_mb,
            )
            for domain, block in config.items()
        }

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Check that every row has a reward and every reward can be built.

        Args:
            rows: with `id`, `domain` and `tag`.

        Raises:
            DataError: a row matches no reward block.
            ConfigError, MissingDependencyError, RewardError: a reward cannot be imported or made.
        """
        self._router.check(rows)
        self._servers.start()
        for pool in self._pools.values():
            pool.check()

    @property
    def domain_names(self) -> list[str]:
        """Names of all reward blocks."""
        return list(self._pools)

    def domains(self, prompts: Iterable[Prompt]) -> list[str]:
        """Return the reward block of each prompt."""
        return [self._router.domain_of(prompt.row) for prompt in prompts]

    def open(self) -> Scoring:
        """Return a context for submitting samples as soon as they are generated; only one may be open at a time."""
        self._servers.start()  # again, where one has died
        return Scoring(self._pools)

    def request(self, prompt: Prompt, response: str) -> tuple[str, RewardRequest]:
        """Return the domain of a sample and the request for its reward. `response` comes from `response_text`."""
        row = {name: value for name, value in prompt.row.items() if name not in COLUMNS_OF_REQUEST}
        return self._router.domain_of(prompt.row), RewardRequest(prompt.text, response, prompt.row["ground_truth"], row)

    def score(
        self, rollouts: Rollouts, responses: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[RewardResult]:
        """Score all samples and return one result per sample, in order.

        Args:
            rollouts: the samples.
            responses: text of each sample, from `response_text`.
            progress: called with (finished samples, all samples).
        """
        with self.open() as scoring:
            for index, (prompt, response) in enumerate(zip(rollouts.prompts, responses, strict=True)):
                scoring.submit(index, *self.request(prompt, response))
            return scoring.results(progress)

    def close(self) -> None:
        """End the worker processes and the servers of judges."""
        for pool in self._pools.values():
            pool.close()
        self._servers.close()
