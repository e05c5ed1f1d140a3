"""Episodes in the place of responses of one turn: requests, clients, and rewards that come with the episode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.templates import ChatFormat
from roll_gspo.rewards.base import RewardRequest, RewardResult
from roll_gspo.roles.episodes import EpisodeRequest
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.scorer import Scorer
from roll_gspo.roles.scoring import Scoring
from roll_gspo.strategies.base import FinishedRequest, Sampling

_SLICE_S = 0.25


class SampleClient(Protocol):
    """The outstanding samples of one caller; see `StreamClient`."""

    @property
    def outstanding(self) -> int:
        """Number of samples that `poll` has not returned."""
        ...

    def submit(self, requests: Sequence[Any]) -> None:
        """Begin samples."""
        ...

    def poll(self, timeout_s: float) -> list[FinishedRequest]:
        """Return the samples that ended; wait about `timeout_s` for one."""
        ...

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove samples and return their tokens so far."""
        ...

    def partials(self) -> list[FinishedRequest]:
        """Return the tokens so far of samples that a checkpoint can continue."""
        ...

    def close(self) -> None:
        """Drop all samples."""
        ...


class EpisodeManager(Scorer):
    """Owns what the model talks to. A response is an episode, which brings its reward."""

    @abstractmethod
    def play(
        self, generator: Generator, tokenizer: Any, chat: ChatFormat, sampling: Sampling, *, validation: bool
    ) -> SampleClient:
        """Return a client that plays episodes with the engines of `generator`.

        Args:
            generator: the engines.
            tokenizer: tokenizer of the model.
            chat: chat template and system prompts.
            sampling: sampling of an answer.
            validation: the episodes are of the validation, whose requests go first.
        """

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
        raise RuntimeError("an episode has its reward already")

    def result(self, completion: Completion) -> RewardResult:
        """Return the reward of an episode."""
        return episode_result(completion)

    def score(
        self, rollouts: Rollouts, responses: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[RewardResult]:
        """Return the rewards of validation episodes."""
        return [episode_result(completion) for completion in rollouts.completions]


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
        manager: makes the requests.
    """

    def __init__(self, generator: Generator, open_client: Callable[[], SampleClient], manager: EpisodeManager) -> None:
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
