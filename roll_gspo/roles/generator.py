"""The policy that generates: prompts to groups of responses, at a known version of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.roles.profiled import ProfiledRole, profiled
from roll_gspo.strategies.base import GenerateStrategy, SampleFinished, Sampling, WeightSource


class Generator(ProfiledRole):
    """`actor_infer`.

    Args:
        strategy: the generation engine.
        pad_token_id: fills up `input_ids`; never attended to.
        seed: of the sampling.
    """

    def __init__(self, strategy: GenerateStrategy, pad_token_id: int, seed: int) -> None:
        self._strategy = strategy
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
            purpose: e.g. `step 12`; with the run's seed it decides every sample, so that a resumed run repeats them.
            progress, finished: see `GenerateStrategy`.
            first: number of the first prompt, where a purpose's prompts are given batch by batch.
        """
        seeds = sample_seeds(self._seed, purpose, first + len(prompts), sampling.num_samples)[first:]
        completions = self._strategy.generate([p.token_ids for p in prompts], sampling, seeds, progress, finished)
        return self.collate(prompts, completions)

    def collate(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Rollouts:
        """Completions of the current weights, `[prompt][sample]`, as one rollout."""
        return Rollouts.collate(prompts, completions, self._pad_token_id, self.weights_version)

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Generate with these weights from now on."""
        self._strategy.update_weights(source, version)
        self.weights_version = version

    def close(self) -> None:
        """Free the engine."""
        self._strategy.shutdown()


def sample_seeds(seed: int, purpose: str, num_prompts: int, num_samples: int) -> list[int]:
    """One seed a prompt, a group apart: sample j of a prompt is drawn with its seed + j."""
    first = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:6], "big")
    return [first + i * num_samples for i in range(num_prompts)]
