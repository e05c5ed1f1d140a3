"""The nearest values that work, for error messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def nearest(value: int, valid: Sequence[int]) -> str:
    """Return the next valid numbers below and above a value, e.g. `2 or 8`; `1` if there are none.

    Args:
        value: the number that is not valid.
        valid: in ascending order.
    """
    below, above = [size for size in valid if size < value], [size for size in valid if size > value]
    return " or ".join(str(size) for size in (*below[-1:], *above[:1])) or "1"


def nearest_multiples(value: int, factor: int) -> str:
    """Return the next multiples of `factor`, e.g. `4 or 6`; 0 is left out."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def set_key(key: str, value: int, works: Callable[[int], bool], otherwise: str = "1") -> str:
    """Return `set KEY to 2 or 8`: the nearest numbers up to `2 * value` that work, `otherwise` if there are none."""
    valid = [size for size in range(1, 2 * value + 1) if works(size)]
    return f"set {key} to {nearest(value, valid) if valid else otherwise}"
