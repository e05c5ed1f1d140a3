"""Size and place of a low-rank adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoraSetup:
    """A low-rank adapter of the linear layers of a model.

    Attributes:
        rank: rows of `A` [rank, in] and columns of `B` [out, rank].
        alpha: numerator of the scale.
        dropout: probability that an input of the adapter is set to 0 in an update.
        target_modules: names of the layers, or `all-linear` alone.
        use_rslora: the denominator of the scale is the root of the rank, not the rank.
        sync: the generation engine receives the adapter alone, or all weights with the adapter merged into them.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    sync: Literal["adapter", "merged"] = "merged"

    @property
    def scale(self) -> float:
        """Factor of `B A` in a layer."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
