"""The order in which items are used: shuffled anew each epoch, the same for the same seed, resumable."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Sampler(Protocol[T]):
    """Endless batches in an order that a checkpoint can hold."""

    def next_batch(self, size: int) -> list[T]:
        """The next `size` items."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError where data, shares or seed are others now."""
        ...

    def epochs(self) -> dict[str, float]:
        """Passes over the data so far: of all of it under the empty name, and of each domain."""
        ...


class PromptSampler(Generic[T]):
    """Endless batches over a fixed sequence of items.

    Args:
        items: at least one.
        seed: of the order; the order of an epoch depends on it and on the epoch's number alone.
        mark: what the items are, so that a checkpoint of others is refused.
    """

    def __init__(self, items: Sequence[T], seed: int, mark: str = "") -> None:
        if not items:
            raise ValueError("a sampler needs at least one item")
        self._items = items
        self._seed = seed
        self._mark = mark
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
            "mark": self._mark,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the data has another number of items now, or the seed is another, and so is the order.
        """
        if (shares := state.get("shares")) is not None:
            raise ValueError(f"the checkpoint's domain_interleave_probs were {_listed(shares)}, now there are none")
        if state["num_items"] != len(self._items):
            raise ValueError(f"the data has {len(self._items)} prompts, the checkpoint's had {state['num_items']}")
        _check_seed_and_mark(state, self._seed, self._mark)
        self.epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def epochs(self) -> dict[str, float]:
        """Passes over the data that are behind."""
        return {"": float(self.epoch)}

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._items)))
        random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        return order


class InterleavedSampler(Generic[T]):
    """Endless batches in which every domain has its share, each domain shuffled anew at each epoch of its own.

    After any number N of drawn items, a domain of share p has had more than p*N - 1 and fewer than p*N + 1 of them:
    Tijdeman's sequence for the chairman assignment problem (Discrete Mathematics 32, 1980) says whose turn it is.
    Within a batch the order is shuffled.

    Args:
        items: of each domain, at least one.
        shares: of each domain with one above 0; they are divided by their sum.
        seed: of all orders.
        mark: what the items are, so that a checkpoint of others is refused.
    """

    def __init__(
        self, items: Mapping[str, Sequence[T]], shares: Mapping[str, float], seed: int, mark: str = ""
    ) -> None:
        wanted = {name: Fraction(repr(float(share))) for name, share in shares.items() if share > 0}
        if not wanted or not all(items.get(name) for name in wanted):
            raise ValueError("an interleaved sampler needs shares, and at least one item of each domain that has one")
        total = sum(wanted.values())
        self._shares = {name: share / total for name, share in wanted.items()}
        self._given = {name: float(shares[name]) for name in wanted}
        self._items = {name: items[name] for name in wanted}
        self._seed = seed
        self._mark = mark
        self._drawn = dict.fromkeys(wanted, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def next_batch(self, size: int) -> list[T]:
        """The next `size` items, every domain with its share."""
        start = sum(self._drawn.values())
        batch = [self._next_of(self._turn(start + place)) for place in range(1, size + 1)]
        random.Random(f"{self._seed}/batch/{start}").shuffle(batch)
        return batch

    def _turn(self, number: int) -> str:
        """Whose item the `number`-th is, counted from 1: of those far enough behind, who would be late first."""
        slack = Fraction(1, max(2 * (len(self._shares) - 1), 1))
        behind = {name: share * number - self._drawn[name] for name, share in self._shares.items()}
        eligible = [name for name in behind if behind[name] >= slack]
        return min(eligible, key=lambda name: ((1 - slack - behind[name]) / self._shares[name], name))

    def _next_of(self, name: str) -> T:
        items = self._items[name]
        epoch, position = divmod(self._drawn[name], len(items))
        known, order = self._orders.get(name, (-1, []))
        if known != epoch:
            order = list(range(len(items)))
            random.Random(f"{self._seed}/{name}/{epoch}").shuffle(order)
            self._orders[name] = epoch, order
        self._drawn[name] += 1
        return items[order[position]]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how many of each domain were drawn decides everything."""
        return {
            "drawn": dict(self._drawn),
            "num_items": {name: len(items) for name, items in self._items.items()},
            "shares": dict(self._given),
            "seed": self._seed,
            "mark": self._mark,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: shares, data or seed are others now, and so is the order.
        """
        if state.get("shares") != self._given:
            before = "none" if state.get("shares") is None else _listed(state["shares"])
            raise ValueError(
                f"domain_interleave_probs are {_listed(self._given)} now, the checkpoint's were {before}: set them back"
            )
        for name, items in self._items.items():
            if state["num_items"][name] != len(items):
                before = state["num_items"][name]
                raise ValueError(f"the data has {len(items)} prompts of '{name}', the checkpoint's had {before}")
        _check_seed_and_mark(state, self._seed, self._mark)
        self._drawn = {name: state["drawn"][name] for name in self._shares}

    def epochs(self) -> dict[str, float]:
        """Whole passes of each domain that are behind; over all of the data: of the domain that has the fewest."""
        # As PromptSampler counts: an epoch is over when the next one begins.
        passes = {name: float(max(self._drawn[name] - 1, 0) // len(items)) for name, items in self._items.items()}
        return {"": min(passes.values()), **passes}


def _check_seed_and_mark(state: dict[str, Any], seed: int, mark: str) -> None:
    if state["seed"] != seed:
        raise ValueError(f"seed is {seed} now, the checkpoint's was {state['seed']}: set it back")
    if state.get("mark", mark) != mark:  # a state of an earlier version has none
        raise ValueError(
            "the data has as many prompts as the checkpoint's, but other ones: rows, their order, the chat template or "
            "a system prompt changed; set them back, or start a new run with `pretrain` set to the checkpoint's model"
        )


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {share:g}" for name, share in shares.items())
