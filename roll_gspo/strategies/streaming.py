"""Outstanding requests of a generation engine, on top of a decoder that samples their tokens.

A `Decoder` belongs to one kind of engine. `OutstandingRequests` adds what all engines share: checks, continuation of
partial responses, delivery, and `generate`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from roll_gspo.batch import Completion
from roll_gspo.errors import DataError
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest, SampleFinished, Sampling


@dataclass(eq=False)
class Response:
    """The response of an outstanding request.

    Attributes:
        key: number of the request.
        prompt: the prompt's tokens.
        sampling: sampling parameters; `num_samples` is ignored.
        seed: seed of the tokens after the first `num_known`.
        limit: maximum number of tokens of the response.
        num_known: number of tokens that the request contained.
        token_ids: tokens of the response, including the known ones.
        log_probs: log-prob of every token.
        version_runs: (weights version, number of tokens) in the order of the tokens; tokens of an unknown version are
            missing.
        finish_reason: empty while the response is being sampled.
        routed_experts: as in `Completion`.
    """

    key: int
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    limit: int
    num_known: int = 0
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    version_runs: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: str = ""
    routed_experts: Tensor | None = None

    @property
    def num_sampled(self) -> int:
        """Number of tokens sampled for this request."""
        return len(self.token_ids) - self.num_known

    def extend(self, token_ids: Sequence[int], log_probs: Sequence[float], version: int | None) -> None:
        """Append tokens that the weights `version` sampled; None if the version is unknown."""
        self.token_ids.extend(token_ids)
        self.log_probs.extend(log_probs)
        if not token_ids or version is None:
            return
        count = len(token_ids)
        if self.version_runs and self.version_runs[-1][0] == version:
            count += self.version_runs.pop()[1]
        self.version_runs.append((version, count))

    def restart(self) -> None:
        """Make the tokens so far known ones, so that a new request can continue after them."""
        self.seed = continuation_seed(self.seed, self.num_sampled)
        self.num_known = len(self.token_ids)

    def completion(self) -> Completion:
        """Return the tokens so far; `finish_reason` is `partial` if the response has not ended.

        `version_runs` is empty unless the version of every token is known.
        """
        complete = sum(tokens for _, tokens in self.version_runs) == len(self.token_ids)
        return Completion(
            tuple(self.token_ids),
            tuple(self.log_probs),
            self.finish_reason or "partial",
            self.routed_experts,
            tuple(self.version_runs) if complete else (),
        )


class Decoder(Protocol):
    """Samples the tokens of responses, many at the same time."""

    def add(self, responses: Sequence[Response]) -> None:
        """Start responses. Those for which there is no room wait in this order."""
        ...

    def step(self) -> list[Response]:
        """Sample about one token per running response. Return the responses that ended, complete."""
        ...

    def read(self, responses: Iterable[Response]) -> None:
        """Append to running responses what was sampled since the last call. Ended responses need no call."""
        ...

    def remove(self, responses: Iterable[Response]) -> None:
        """Stop responses; those that ended already are ignored."""
        ...


@dataclass(frozen=True)
class PromptLimits:
    """Prompts that a model accepts.

    Attributes:
        vocab_size: number of token ids; every id is below it.
        max_length: longest prompt plus response, in tokens; None if there is no limit.
    """

    vocab_size: int
    max_length: int | None = None

    def check(self, name: str, prompt: Sequence[int]) -> None:
        """Check a prompt, called `name` in errors.

        Raises:
            DataError: the prompt is empty, too long, or contains an id outside the vocabulary.
        """
        if not prompt:
            raise DataError(f"{name} has 0 tokens; give it at least one token")
        if self.max_length is not None and len(prompt) >= self.max_length:
            raise DataError(
                f"{name} has {len(prompt)} tokens, but 1 to {self.max_length - 1} fit a model length that includes a "
                "response; drop the prompt or allow longer sequences"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise DataError(
                f"{name} has token ids from {min(prompt)} to {max(prompt)}, but the vocabulary ends at "
                f"{self.vocab_size - 1}; use the model's own tokenizer"
            )

    def longest_response(self, request: GenerationRequest) -> int:
        """Return the number of tokens after which the response ends."""
        limit = request.sampling.max_new_tokens
        return limit if self.max_length is None else min(limit, self.max_length - len(request.prompt))


def continuation_seed(seed: int, num_known: int) -> int:
    """Return the seed of the tokens after the first `num_known`; `seed` itself if none are known."""
    if num_known == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{num_known}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class OutstandingRequests:
    """The requests of one engine that are not delivered yet.

    Keys below 0 belong to `generate`.

    Args:
        decoder: samples the tokens.
        limits: the prompts that the model accepts.
    """

    def __init__(self, decoder: Decoder, limits: PromptLimits) -> None:
        self._decoder = decoder
        self._limits = limits
        self._running: dict[int, Response] = {}
        self._ended: dict[int, Response] = {}  # not delivered yet

    @property
    def num_running(self) -> int:
        """Number of requests whose responses have not ended."""
        return len(self._running)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests.

        Raises:
            DataError: a prompt is refused.
            ValueError: a key is negative or outstanding, a seed is negative, or a partial response is inconsistent.
        """
        for request in requests:
            if request.key < 0:
                raise ValueError(f"submit: key {request.key} is negative; give keys from 0")
            self._limits.check(f"submit: the prompt of request {request.key}", request.prompt)
        self._add(requests)

    def _add(self, requests: Sequence[GenerationRequest]) -> None:
        added: dict[int, Response] = {}
        for request in requests:
            if request.key in added or request.key in self._running or request.key in self._ended:
                raise ValueError(f"request {request.key} is outstanding already; give each request another key")
            added[request.key] = self._response(request)
        running = [response for response in added.values() if not response.finish_reason]
        try:
            self._decoder.add(running)
        except BaseException:
            self._decoder.remove(running)
            raise
        for key, response in added.items():
            (self._ended if response.finish_reason else self._running)[key] = response

    def _response(self, request: GenerationRequest) -> Response:
        if request.seed < 0:  # vLLM treats -1 as "no seed"
            raise ValueError(f"request {request.key}: seed {request.seed} is negative; give seeds from 0")
        known = request.partial or Completion((), (), "partial")
        count = len(known.token_ids)
        of_versions = sum(tokens for _, tokens in known.version_runs)
        if len(known.log_probs) != count or (known.version_runs and of_versions != count):
            raise ValueError(
                f"request {request.key}: partial has {count} tokens, but {len(known.log_probs)} log-probs and "
                f"version_runs {known.version_runs}; give both for every token"
            )
        response = Response(
            request.key,
            request.prompt,
            request.sampling,
            continuation_seed(request.seed, count),
            self._limits.longest_response(request),
            count,
            list(known.token_ids),
            list(known.log_probs),
            list(known.version_runs),
        )
        if count and known.token_ids[-1] in request.sampling.stop_token_ids:
            response.finish_reason = "stop"
        elif count >= response.limit:
            response.finish_reason = "length"
        return response

    def advance(self, seconds: float) -> list[FinishedRequest]:
        """Decode for about `seconds` and return the requests that ended.

        If decoding fails or is interrupted, no request remains.
        """
        deadline = time.monotonic() + seconds
        while self._running:
            self._step()
            if time.monotonic() >= deadline:
                break
        ended = [FinishedRequest(key, response.completion()) for key, response in self._ended.items()]
        self._ended.clear()
        return ended

    def _step(self) -> list[Response]:
        try:
            ended = self._decoder.step()
        except BaseException:
            self.clear()
            raise
        for response in ended:
            self._ended[response.key] = self._running.pop(response.key)
        return ended

    def abort(self, keys: Sequence[int]) -> list[FinishedRequest]:
        """Remove requests and return what they have sampled."""
        stopped = {key: self._running.pop(key) for key in keys if key in self._running}
        self._decoder.read(stopped.values())
        self._decoder.remove(stopped.values())
        removed = stopped | {key: self._ended.pop(key) for key in keys if key in self._ended}
        return [FinishedRequest(key, response.completion()) for key, response in removed.items()]

    def partials(self) -> list[FinishedRequest]:
        """Return what every outstanding request has sampled."""
        self.read()
        return [FinishedRequest(key, response.completion()) for key, response in (self._ended | self._running).items()]

    def read(self) -> None:
        """Append to the responses what was sampled so far. Call it before the weights version changes."""
        self._decoder.read(self._running.values())

    def clear(self) -> None:
        """Remove all requests."""
        running = list(self._running.values())
        self._running.clear()
        self._ended.clear()
        self._decoder.remove(running)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None,
        finished: SampleFinished | None,
        batch_size: int | None = None,
    ) -> list[list[Completion]]:
        """Implement `GenerateStrategy.generate`; other requests continue meanwhile.

        Args:
            prompts, sampling, seeds, progress, finished: as in `GenerateStrategy.generate`.
            batch_size: a batch of this many samples starts after the one before has ended; None starts all at once.
        """
        if not prompts:
            raise DataError("generate: no prompts were given; give at least one")
        if len(seeds) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts but {len(seeds)} seeds; give one per prompt")
        if min(seeds) < 0:
            raise ValueError(f"generate: seed {min(seeds)} is negative; give seeds from 0")
        for index, prompt in enumerate(prompts):
            self._limits.check(f"generate: prompt {index}", prompt)
        size = sampling.num_samples
        samples = [
            GenerationRequest(-1 - (index * size + sample), tuple(prompt), sampling, seed + sample)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            for sample in range(size)
        ]
        done: dict[int, Completion] = {}
        batch_size = batch_size or len(samples)
        try:
            for start in range(0, len(samples), batch_size):
                self._add(samples[start : start + batch_size])
                while len(done) < min(start + batch_size, len(samples)):
                    newly = [response for response in self._step() if response.key < 0]
                    for response in newly:
                        del self._ended[response.key]
                        index = -1 - response.key
                        done[index] = response.completion()
                        if finished is not None:
                            finished(*divmod(index, size), done[index])
                    if progress is not None and newly:
                        progress(len(done), len(samples))
        finally:  # an interrupt must not leave requests that the next call would continue
            self.abort([sample.key for sample in samples])
        return [[done[start + sample] for sample in range(size)] for start in range(0, len(samples), size)]
