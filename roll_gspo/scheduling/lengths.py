"""Response lengths of simulated groups: log-normal, or those of a run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol


class Lengths(Protocol):
    """A source of groups; every simulation draws the same ones."""

    def groups(self) -> Iterator[Sequence[int]]:
        """Yield the response lengths of group after group, in tokens and without end."""
        ...


@dataclass(frozen=True)
class LogNormalLengths(Lengths):
    """Log-normal lengths, cut at a limit.

    Attributes:
        median: median length in tokens.
        sigma: standard deviation of the logarithm; 0 gives equal lengths.
        limit: maximum length in tokens.
        samples_per_group: responses per group.
        seed: seed of the lengths.
    """

    median: float
    sigma: float
    limit: int
    samples_per_group: int
    seed: int = 0

    def groups(self) -> Iterator[Sequence[int]]:
        generator = random.Random(self.seed)
        while True:
            factors = [generator.lognormvariate(0.0, self.sigma) for _ in range(self.samples_per_group)]
            yield [min(self.limit, max(1, round(self.median * factor))) for factor in factors]


@dataclass(frozen=True)
class RecordedLengths(Lengths):
    """Lengths of recorded groups, in their order and repeated without end."""

    recorded: tuple[tuple[int, ...], ...]

    def groups(self) -> Iterator[Sequence[int]]:
        return cycle(self.recorded)
