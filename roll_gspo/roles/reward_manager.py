"""The reward manager: sends samples to the reward workers of their domains and collects scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.config.reward_table import SHIPPED_REWARDS, resolve_reward
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.errors import ConfigError
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.rewards.from_config import spec_from_config
from roll_gspo.rewards.llm_judge.server import JudgeServers
from roll_gspo.rewards.pool import RewardPool
from roll_gspo.roles.scorer import Scorer
from roll_gspo.roles.scoring import Scoring

logger = logging.getLogger(__name__)
# Exceptions that do not depend on the response.
_NEVER_WORK = ("ConfigError", "NameError", "ImportError", "ModuleNotFoundError", "MissingDependencyError")
COLUMNS_OF_REQUEST = ("ground_truth",)


class RewardManager(Scorer):
    """Owns the reward workers of every domain.

    Args:
        config: reward blocks by domain.
    """

    def __init__(self, config: Mapping[str, RewardConfig]) -> None:
        super().__init__({domain: block.tag_included for domain, block in config.items()})
        self._probed = {domain for domain, block in config.items() if _has_own_code(block)}
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
        """Check that every row has a reward, every reward can be built, and your own rewards score a row.

        Args:
            rows: columns of the data rows: `id`, `domain`, `tag`, `ground_truth` and others.

        Raises:
            DataError: a row matches no reward block.
            ConfigError, MissingDependencyError: a reward cannot be imported, or not called with these rows.
            RewardError: a reward cannot be made, or its code cannot run.
        """
        columns = list(rows)
        self._router.check(columns)
        self._servers.start()
        for pool in self._pools.values():
            pool.check()
        first = {self._router.domain_of(row): row for row in reversed(columns)}
        for domain, row in first.items():
            if domain in self._probed:
                _probe(self._pools[domain], f"rewards.{domain}", row)

    def open(self) -> Scoring:
        """Return a context that scores samples as soon as they are generated.

        Several may be open at once, in different threads. They share the worker processes fairly.
        """
        self._servers.start()  # again, if one has died
        return Scoring(self._pools, self._servers.start)

    def request(self, prompt: Prompt, response: str) -> tuple[str, RewardRequest]:
        """Return the domain of a sample and the request for its reward. `response` comes from `response_text`."""
        row = {name: value for name, value in prompt.row.items() if name not in COLUMNS_OF_REQUEST}
        return self._router.domain_of(prompt.row), RewardRequest(prompt.text, response, prompt.row["ground_truth"], row)

    def result(self, completion: Completion) -> RewardResult | None:
        """Return None: a worker scores the response."""
        return None

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


def _has_own_code(block: RewardConfig) -> bool:
    """Return whether the reward or a part is not shipped. A probe must not call the server of a judge."""
    classes = [part.worker_cls for part in block.parts.values()] if block.parts else [block.worker_cls]
    names = {resolve_reward(name) for name in classes if name is not None}
    return "llm_judge" not in names and not names <= SHIPPED_REWARDS.keys()


def _probe(pool: RewardPool, key: str, row: Mapping[str, Any]) -> None:
    """Score the ground truth of one row, so that a reward that can never work fails before the model is loaded."""
    rest = {name: value for name, value in row.items() if name not in COLUMNS_OF_REQUEST}
    truth = str(row.get("ground_truth", ""))
    (result,) = pool.score([RewardRequest("", truth, truth, rest)])
    if result.failed is None:
        return
    text = f"{key}: a trial on row {row.get('id', '?')} failed: {result.failed}\n{result.traceback}".rstrip()
    if result.failed.split(":")[0] in _NEVER_WORK:
        raise ConfigError(text)
    logger.warning("%s\n(the response was the ground truth; python -m roll_gspo.rewards try tries others)", text)
