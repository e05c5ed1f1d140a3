"""Requests of the stream of groups: responses of one turn, or episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.roles.environment_manager import EnvironmentManager
from roll_gspo.roles.episodes import EpisodeClient
from roll_gspo.roles.generator import Generator
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, Sampling


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


class RequestSource(Protocol):
    """Makes the requests for the samples of a group, and the client that takes them."""

    def open(self) -> SampleClient:
        """Return a client."""
        ...

    def request(self, group: Group, sample: int, key: int) -> Any:
        """Return the request for a sample."""
        ...


class Responses:
    """Responses of one turn.

    Args:
        generator: the engines.
        sampling: sampling of the responses.
    """

    def __init__(self, generator: Generator, sampling: Sampling) -> None:
        self._generator = generator
        self._sampling = sampling

    def open(self) -> SampleClient:
        """Return a client of the engines."""
        return self._generator.open_stream()

    def request(self, group: Group, sample: int, key: int) -> GenerationRequest:
        """Return the request for a response, which continues the tokens that a checkpoint had of it."""
        return group.request(sample, key, self._sampling)


class Episodes:
    """Episodes of several turns.

    Args:
        manager: the environments.
        open_client: returns a client that plays training episodes.
    """

    def __init__(self, manager: EnvironmentManager, open_client: Callable[[], EpisodeClient]) -> None:
        self._manager = manager
        self._open_client = open_client

    def open(self) -> SampleClient:
        """Return a client that plays episodes."""
        return self._open_client()

    def request(self, group: Group, sample: int, key: int) -> Any:
        """Return the request for an episode. All episodes of a group have one seed of the environment."""
        return self._manager.episode(key, group.prompt, group.seeds[sample], group.seeds[0])
