"""Resumable samplers with a shuffled order that depends only on the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Sampler(Protocol[T]):
    """Yields endless batches in a resumable order."""

    def next_batch(self, size: int) -> list[T]:
        """Return the next `size` items."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ValueError: the data, the shares or the seed differ from the checkpoint's.
        """
        ...

    def epochs(self) -> dict[str, float]:
        """Return the number of completed epochs: over all data (key ""), and per domain."""
        ...


class PromptSampler(Generic[T]):
    """Yields endless batches over a fixed sequence of items, shuffled in each epoch.

    Args:
        items: items to sample from, at least one.
        seed: seed of the order. The order of an epoch depends only on the seed and the number of the epoch.
        fingerprint: hash of the items; a checkpoint with another one is rejected.
    """

    def __init__(self, items: Sequence[T], seed: int, fingerprint: str = "") -> None:
        if not items:
            raise ValueError("a sampler needs at least one item")
        self._items = items
        self._seed = seed
        self._fingerprint = fingerprint
        self.epoch = 0
        self._position = 0
        self._order = self._shuffled()

    def next_batch(self, size: int) -> list[T]:
        """Return the next `size` items, which may span several epochs."""
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
        """Return the state for a checkpoint."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "num_items": len(self._items),
            "seed": self._seed,
            "mark": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ValueError: the items or the seed differ from the checkpoint's, and so does the order.
        """
        if (shares := state.get("shares")) is not None:
            raise ValueError(
                f"domain_interleave_probs are not set, but the checkpoint has {_format_shares(shares)}; set them back"
            )
        if state["num_items"] != len(self._items):
            raise ValueError(
                f"the data has {len(self._items)} prompts, but the checkpoint's had {state['num_items']}; restore it"
            )
        _check_seed_and_fingerprint(state, self._seed, self._fingerprint)
        self.epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def epochs(self) -> dict[str, float]:
        """Return the number of completed epochs (key "")."""
        return {"": float(self.epoch)}

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._items)))
        random.Random(f"{self._seed}/{self.epoch}").shuffle(order)
        return order


class InterleavedSampler(Generic[T]):
    """Yields endless batches in which every domain has a fixed share. Each domain is shuffled in each of its epochs.

    Of the first N items, a domain with share p has more than p*N - 1 and fewer than p*N + 1. The domain of each item
    follows from Tijdeman's sequence for the chairman assignment problem (Discrete Mathematics 32, 1980). The order
    within a batch is shuffled.

    Args:
        items: items by domain, at least one per domain with a positive share.
        shares: share of each domain, normalized to a sum of 1; domains with share 0 are not sampled.
        seed: seed of all orders.
        fingerprint: hash of the items; a checkpoint with another one is rejected.
    """

    def __init__(
        self, items: Mapping[str, Sequence[T]], shares: Mapping[str, float], seed: int, fingerprint: str = ""
    ) -> None:
        positive = {name: Fraction(repr(float(share))) for name, share in shares.items() if share > 0}
        if not positive or not all(items.get(name) for name in positive):
            raise ValueError("an interleaved sampler needs a positive share, and items of each domain that has one")
        total = sum(positive.values())
        self._shares = {name: share / total for name, share in positive.items()}
        self._configured_shares = {name: float(shares[name]) for name in positive}
        self._items = {name: items[name] for name in positive}
        self._seed = seed
        self._fingerprint = fingerprint
        self._drawn = dict.fromkeys(positive, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def next_batch(self, size: int) -> list[T]:
        """Return the next `size` items with the configured share of each domain."""
        start = sum(self._drawn.values())
        batch = [self._next_item(self._domain_of(start + offset)) for offset in range(1, size + 1)]
        random.Random(f"{self._seed}/batch/{start}").shuffle(batch)
        return batch

    def _domain_of(self, number: int) -> str:
        """Return the domain of the `number`-th item, counted from 1.

        Among the domains whose deficit is large enough, this is the one with the earliest deadline.
        """
        slack = Fraction(1, max(2 * (len(self._shares) - 1), 1))
        deficits = {name: share * number - self._drawn[name] for name, share in self._shares.items()}
        eligible = [name for name in deficits if deficits[name] >= slack]
        return min(eligible, key=lambda name: ((1 - slack - deficits[name]) / self._shares[name], name))

    def _next_item(self, name: str) -> T:
        items = self._items[name]
        epoch, position = divmod(self._drawn[name], len(items))
        shuffled_epoch, order = self._orders.get(name, (-1, []))
        if shuffled_epoch != epoch:
            order = list(range(len(items)))
            random.Random(f"{self._seed}/{name}/{epoch}").shuffle(order)
            self._orders[name] = epoch, order
        self._drawn[name] += 1
        return items[order[position]]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. The order depends only on the number of drawn items per domain."""
        return {
            "drawn": dict(self._drawn),
            "num_items": {name: len(items) for name, items in self._items.items()},
            "shares": dict(self._configured_shares),
            "seed": self._seed,
            "mark": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ValueError: the shares, the items or the seed differ from the checkpoint's, and so does the order.
        """
        if state.get("shares") != self._configured_shares:
            before = "none" if state.get("shares") is None else _format_shares(state["shares"])
            raise ValueError(
                f"domain_interleave_probs are {_format_shares(self._configured_shares)}, but the checkpoint has "
                f"{before}; set them back"
            )
        for name, items in self._items.items():
            if state["num_items"][name] != len(items):
                before = state["num_items"][name]
                raise ValueError(
                    f"the data has {len(items)} prompts of '{name}', but the checkpoint's had {before}; restore it"
                )
        _check_seed_and_fingerprint(state, self._seed, self._fingerprint)
        self._drawn = {name: state["drawn"][name] for name in self._shares}

    def epochs(self) -> dict[str, float]:
        """Return the number of completed epochs per domain, and their minimum (key "")."""
        # An epoch is complete when the next one starts, as in `PromptSampler`.
        epochs = {name: float(max(self._drawn[name] - 1, 0) // len(items)) for name, items in self._items.items()}
        return {"": min(epochs.values()), **epochs}


def _check_seed_and_fingerprint(state: dict[str, Any], seed: int, fingerprint: str) -> None:
    if state["seed"] != seed:
        raise ValueError(f"seed is {seed}, but the checkpoint has {state['seed']}; set it back")
    if state.get("mark", fingerprint) != fingerprint:  # checkpoints of earlier versions have no fingerprint
        raise ValueError(
            "the prompts differ from the checkpoint's, because the rows, their order, the chat template or a system "
            "prompt changed; restore them, or start a new run with pretrain set to the checkpoint's model"
        )


def _format_shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {share:g}" for name, share in shares.items())
