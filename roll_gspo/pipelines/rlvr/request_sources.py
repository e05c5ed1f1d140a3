"""Requests of the stream of groups: responses of one turn, or episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from roll_gspo.pipelines.rlvr.groups import Group
from roll_gspo.roles.episode_manager import EpisodeManager, SampleClient
from roll_gspo.roles.generator import Generator
from roll_gspo.strategies.base import GenerationRequest, Sampling


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
        manager: makes the requests.
        open_client: returns a client that plays training episodes.
    """

    def __init__(self, manager: EpisodeManager, open_client: Callable[[], SampleClient]) -> None:
        self._manager = manager
        self._open_client = open_client

    def open(self) -> SampleClient:
        """Return a client that plays episodes."""
        return self._open_client()

    def request(self, group: Group, sample: int, key: int) -> Any:
        """Return the request for an episode. All episodes of a group have one seed of the environment."""
        return self._manager.episode(key, group.prompt, group.seeds[sample], group.seeds[0])
