"""Groups of samples: the responses to one prompt, from the draw of the prompt to the training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from roll_gspo.algorithms.query_filter import QueryFilterSettings, kept_groups
from roll_gspo.batch import Completion, Prompt
from roll_gspo.rewards.base import RewardResult
from roll_gspo.strategies.base import GenerationRequest, Sampling


@dataclass(eq=False)
class Group:
    """The samples of one prompt.

    Attributes:
        slot: number of the group in the scheduler.
        draw: position of the prompt among those drawn for its batch, or in the run if weights change in flight.
        prompt: the prompt.
        domain: reward block of the prompt.
        seeds: seed of each sample.
        completions: finished responses by number of the sample.
        partials: tokens of unfinished responses that were saved with a checkpoint.
        results: reward results by number of the sample.
        is_filler: the group failed the filter and fills a batch that would be incomplete.
    """

    slot: int
    draw: int
    prompt: Prompt
    domain: str
    seeds: tuple[int, ...]
    completions: dict[int, Completion] = field(default_factory=dict)
    partials: dict[int, Completion] = field(default_factory=dict)
    results: dict[int, RewardResult] = field(default_factory=dict)
    is_filler: bool = False

    @property
    def is_scored(self) -> bool:
        """True if every sample has a reward result."""
        return len(self.results) == len(self.seeds)

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens of all responses."""
        return sum(completion.num_sampled for completion in self.completions.values())

    @property
    def ordered_completions(self) -> tuple[Completion, ...]:
        """The responses by number of the sample; the group is scored."""
        return tuple(self.completions[sample] for sample in range(len(self.seeds)))

    @property
    def ordered_results(self) -> tuple[RewardResult, ...]:
        """The reward results by number of the sample; the group is scored."""
        return tuple(self.results[sample] for sample in range(len(self.seeds)))

    def missing(self) -> Iterator[int]:
        """Yield the numbers of samples without a response."""
        return (sample for sample in range(len(self.seeds)) if sample not in self.completions)

    def request(self, sample: int, key: int, sampling: Sampling) -> GenerationRequest:
        """Return the request for a sample."""
        tokens = self.prompt.token_ids
        return GenerationRequest(key, tokens, sampling, self.seeds[sample], self.partials.get(sample))

    def passes(self, query_filter: QueryFilterSettings | None) -> bool:
        """Return whether the group passes the filter. Samples whose reward failed are ignored."""
        if query_filter is None:
            return True
        scores = torch.tensor([result.score for result in self.results.values() if result.failed is None])
        if len(scores) < min(2, len(self.results)):
            return False
        return bool(kept_groups(scores, torch.zeros(len(scores), dtype=torch.int64), query_filter).all())
