"""Requests on an engine that generates whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from roll_gspo.batch import Completion
from roll_gspo.errors import ConfigError
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, Sampling, StreamingStrategy

_BATCH_SIZE = 64


class _BatchEngine(Protocol):
    """The part of `GenerateStrategy` that is used here."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]: ...


class RequestEngine(Protocol):
    """The request methods of `StreamingStrategy`."""

    @property
    def capacity(self) -> int: ...

    def submit(self, requests: Sequence[GenerationRequest]) -> None: ...

    def advance(self, seconds: float) -> list[FinishedRequest]: ...

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]: ...

    def partials(self) -> list[FinishedRequest]: ...


def streaming(engine: _BatchEngine) -> RequestEngine:
    """Return the request methods of an engine; those of `BatchStreaming` if it has none."""
    return engine if isinstance(engine, StreamingStrategy) else BatchStreaming(engine)


class BatchStreaming:
    """The request methods of `StreamingStrategy` for an engine that only implements `generate`.

    `advance` generates a batch to its end. Requests that arrive meanwhile wait for the next batch.
    """

    capacity = _BATCH_SIZE

    def __init__(self, engine: _BatchEngine) -> None:
        self._engine = engine
        self._waiting: dict[int, GenerationRequest] = {}

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests.

        Raises:
            ConfigError: a request continues a response.
        """
        if any(request.partial and request.partial.token_ids for request in requests):
            raise ConfigError(
                f"{type(self._engine).__name__}: the engine cannot continue a response; implement StreamingStrategy, "
                "or restart partial responses"
            )
        self._waiting.update((request.key, request) for request in requests)

    def advance(self, seconds: float) -> list[FinishedRequest]:
        """Generate the next batch of requests with the same sampling parameters, however long it takes."""
        sampling = next((request.sampling for request in self._waiting.values()), None)
        if sampling is None:
            return []
        batch = [request for request in self._waiting.values() if request.sampling == sampling][:_BATCH_SIZE]
        groups = self._engine.generate(
            [request.prompt for request in batch], replace(sampling, num_samples=1), [request.seed for request in batch]
        )
        for request in batch:
            del self._waiting[request.key]
        return [FinishedRequest(request.key, group[0]) for request, group in zip(batch, groups, strict=True)]

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests that wait."""
        removed = [key for key in keys if self._waiting.pop(key, None)]
        return [FinishedRequest(key, Completion((), (), "partial")) for key in removed]

    def partials(self) -> list[FinishedRequest]:
        """Return an empty response per request that waits."""
        return [FinishedRequest(key, Completion((), (), "partial")) for key in self._waiting]
