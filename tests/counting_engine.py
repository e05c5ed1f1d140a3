"""A streaming engine without a model: its tokens show prompt, seed and position, and its log-probs the weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from roll_gspo.batch import Completion
from roll_gspo.errors import DataError
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, SampleFinished, Sampling, WeightSource


def token(prompt: Sequence[int], seed: int, position: int) -> int:
    """Return the token that the engine samples."""
    return 1000 * sum(prompt) + 10 * seed + position


def letter(sampled: int) -> int:
    """Return the token of `models.tiny.byte_tokenizer` for a letter, which depends on a sampled token."""
    return 40 + sampled % 50


@dataclass
class _Row:
    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)

    def completion(self, reason: str) -> Completion:
        runs = tuple((version, count) for version, count in self.versions)
        return Completion(tuple(self.tokens), tuple(self.log_probs), reason, None, runs)


class CountingEngine:
    """A `StreamingStrategy` that samples `per_advance` tokens per request and call of `advance`.

    A response ends after `max_new_tokens`. A prompt that contains a negative token is rejected. A seed that gives
    negative tokens makes `advance` fail. With `letters`, tokens are those of the byte tokenizer; see `letter`.
    """

    letters = False

    def __init__(self, capacity: int = 16, per_advance: int = 2) -> None:
        self.capacity, self.per_advance, self.version = capacity, per_advance, 0
        self.outstanding: dict[int, _Row] = {}
        self.most = 0
        self.order: list[int] = []

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        if any(min(request.prompt) < 0 for request in requests):
            raise DataError("generate: token ids from -1; use the model's own tokenizer")
        for request in requests:
            row = self.outstanding[request.key] = _Row(request)
            self.order.append(request.seed)
            if request.partial is not None:
                row.tokens += request.partial.token_ids
                row.log_probs += request.partial.log_probs
                row.versions += [list(run) for run in request.partial.version_runs]
        self.most = max(self.most, len(self.outstanding))

    def advance(self, seconds: float) -> list[FinishedRequest]:
        for row in list(self.outstanding.values())[: self.capacity]:
            for position in range(len(row.tokens), len(row.tokens) + self.per_advance):
                if position < row.request.sampling.max_new_tokens:
                    self._sample(row, position)
        ended = [key for key, row in self.outstanding.items() if len(row.tokens) == row.request.sampling.max_new_tokens]
        return [FinishedRequest(key, self.outstanding.pop(key).completion("length")) for key in ended]

    def _sample(self, row: _Row, position: int) -> None:
        sampled = token(row.request.prompt, row.request.seed, position)
        if sampled < 0:
            raise ValueError(f"negative token {sampled}")
        row.tokens.append(letter(sampled) if self.letters else sampled)
        row.log_probs.append(-float(self.version))
        if not row.versions or row.versions[-1][0] != self.version:
            row.versions.append([self.version, 0])
        row.versions[-1][1] += 1

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        rows = {key: self.outstanding.pop(key) for key in keys if key in self.outstanding}
        return [FinishedRequest(key, row.completion("partial")) for key, row in rows.items()]

    def partials(self) -> list[FinishedRequest]:
        return [FinishedRequest(key, row.completion("partial")) for key, row in self.outstanding.items()]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
        finished: SampleFinished | None = None,
    ) -> list[list[Completion]]:
        def sample(prompt: Sequence[int], seed: int) -> Completion:
            length = sampling.max_new_tokens
            tokens = tuple(token(prompt, seed, position) for position in range(length))
            return Completion(tokens, (-float(self.version),) * length, "length")

        return [
            [sample(prompt, seed + j) for j in range(sampling.num_samples)]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def update_weights(self, source: WeightSource, version: int) -> None:
        self.version = version

    def shutdown(self) -> None: ...


class RandomEngine(CountingEngine):
    """A `CountingEngine` whose requests advance in random order; the length of a response depends on its seed.

    Args:
        order: seed of the order. It has no influence on the responses.
        capacity: number of requests that advance.
        records_experts: completions hold routed experts.
    """

    def __init__(self, order: int, capacity: int = 16, records_experts: bool = False) -> None:
        super().__init__(capacity, per_advance=1)
        self._random = random.Random(order)
        self._records_experts = records_experts

    def advance(self, seconds: float) -> list[FinishedRequest]:
        for row in list(self.outstanding.values())[: self.capacity]:
            if self._random.random() < 0.6:
                self._sample(row, len(row.tokens))
        ended = [key for key, row in self.outstanding.items() if len(row.tokens) >= self.length(row.request)]
        self._random.shuffle(ended)
        return [self._finished(key, self.outstanding.pop(key), "length") for key in ended]

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        rows = {key: self.outstanding.pop(key) for key in keys if key in self.outstanding}
        return [self._finished(key, row, "partial") for key, row in rows.items()]

    def partials(self) -> list[FinishedRequest]:
        return [self._finished(key, row, "partial") for key, row in self.outstanding.items()]

    def _sample(self, row: _Row, position: int) -> None:
        super()._sample(row, position)
        row.tokens[-1] %= 30011  # fits into the files of samples

    @staticmethod
    def length(request: GenerationRequest) -> int:
        """Return the length of a response."""
        return random.Random(request.seed).randint(1, request.sampling.max_new_tokens)

    def _finished(self, key: int, row: _Row, reason: str) -> FinishedRequest:
        completion = row.completion(reason)
        if self._records_experts and row.tokens:
            known = [*row.request.prompt, *row.tokens][:-1]
            experts = torch.tensor(known, dtype=torch.int64).remainder(7).to(torch.int16)[:, None, None]
            completion = replace(completion, routed_experts=torch.cat([experts, experts + 1], dim=2))
        return FinishedRequest(key, completion)
