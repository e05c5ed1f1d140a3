"""The order in which items are used: shuffled anew each epoch, the same for the same seed, resumable."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PromptSampler(Generic[T]):
    """Endless batches over a fixed sequence of items.

    Args:
        items: at least one.
        seed: of the order; the order of an epoch depends on it and on the epoch's number alone.
    """

    def __init__(self, items: Sequence[T], seed: int) -> None:
        if not items:
            raise ValueError("a sampler needs at least one item")
        self._items = items
        self._seed = seed
        self.epoch = 0
        self._position = 0
        self._order = self._shuffled()

    def next_batch(self, size: int) -> list[T]:
        """The next `size` items; goes on into the next epoch where this one ends."""
        batch = []
        while len(batch) < size:
            if self._position == len(self._items):
                self.epoch += 1
                self._position = 0
                self._order = self._shuffled()
            take = self._order[self._position : self._position + size - len(batch)]
            self._position += len(take)
            batch += [self._items[i] for i in take]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "num_items": len(self._items),
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the data has another number of items now, or the seed is another, and so is the order.
        """
        if state["num_items"] != len(self._items):
            raise ValueError(f"the data has {len(self._items)} prompts, the checkpoint's had {state['num_items']}")
        if state["seed"] != self._seed:
            raise ValueError(f"seed is {self._seed} now, the checkpoint's was {state['seed']}: set it back")
        self.epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._items)))
        random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        return order
