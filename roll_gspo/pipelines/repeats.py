"""Schedule of warnings that hold for many steps (no torch: the plan imports it)."""

from __future__ import annotations


def is_due(count: int, first: int) -> bool:
    """Return whether `count` is `first` times a power of two."""
    times, rest = divmod(count, first)
    return not rest and times & (times - 1) == 0 and times > 0
