"""The generating policy: samples groups of responses with a known version of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.roles.profiled import ProfiledRole, profiled
from roll_gspo.roles.request_stream import RequestStream, StreamClient
from roll_gspo.roles.shared_devices import ResidentRole
from roll_gspo.strategies.base import GenerateStrategy, SampleFinished, Sampling, WeightSource
from roll_gspo.tracking.profiler import record_trace


class Generator(ProfiledRole, ResidentRole):
    """The role `actor_infer`: samples responses.

    Args:
        strategy: generation engine.
        pad_token_id: fills `input_ids` after the last token; never attended to.
        seed: seed of the sampling.
        stream: requests to the same engine; None if it only generates whole batches.
    """

    def __init__(
        self, strategy: GenerateStrategy, pad_token_id: int, seed: int, stream: RequestStream | None = None
    ) -> None:
        self._strategy: GenerateStrategy = strategy
        self._stream = stream
        self._pad_token_id = pad_token_id
        self._seed = seed
        self.weights_version = -1

    @profiled
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        purpose: str,
        progress: Callable[[int, int], None] | None = None,
        finished: SampleFinished | None = None,
        first: int = 0,
    ) -> Rollouts:
        """Sample `sampling.num_samples` responses per prompt.

        Args:
            prompts: prompts of this call.
            sampling: sampling parameters.
            purpose: text such as `step 12`. It determines every sample with the run's seed, so a resumed run repeats
                them.
            progress, finished: see `GenerateStrategy.generate`.
            first: number of the first prompt, if the prompts of a purpose are given batch by batch.
        """
        seeds = sample_seeds(self._seed, purpose, first + len(prompts), sampling.num_samples)[first:]
        completions = self._strategy.generate([p.token_ids for p in prompts], sampling, seeds, progress, finished)
        return self.collate(prompts, completions)

    def open_stream(self, urgent: bool = False) -> StreamClient:
        """Return a new client of the engine's request stream. With `urgent`, its requests go before waiting ones."""
        if self._stream is None:
            raise RuntimeError("actor_infer: the engine was built without a request stream")
        return self._stream.open(urgent)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Record a trace of the block, in which clients of the stream poll; see `ProfiledRole.profile`."""
        path = self.next_trace("generate")
        with nullcontext() if path is None else record_trace(path):
            yield

    def paused(self) -> AbstractContextManager[None]:
        """Let the engine not compute in the block; see `RequestStream.paused`."""
        return nullcontext() if self._stream is None else self._stream.paused()

    def check_alive(self) -> None:
        """Check that an engine is left; see `RequestStream.check_alive`."""
        if self._stream is not None:
            self._stream.check_alive()

    def seeds(self, purpose: str, number: int, num_samples: int) -> range:
        """Return the seeds of a prompt's samples, equal to those of prompt `number` in `generate`."""
        first = _first_seed(self._seed, purpose) + number * num_samples
        return range(first, first + num_samples)

    def collate(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Rollouts:
        """Return completions `[prompt][sample]` of the current weights as one rollout."""
        return Rollouts.collate(prompts, completions, self._pad_token_id, self.weights_version)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Replace the weights; later tokens are sampled from them, also those of outstanding requests."""
        with self.paused():
            self._strategy.update_weights(source, version)
            self.weights_version = version

    def close(self) -> None:
        """Free the engine."""
        self._strategy.shutdown()


def sample_seeds(seed: int, purpose: str, num_prompts: int, num_samples: int) -> list[int]:
    """Return one seed per prompt, spaced by the group size: sample j of a prompt uses its seed + j."""
    first = _first_seed(seed, purpose)
    return [first + i * num_samples for i in range(num_prompts)]


def _first_seed(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:6], "big")
