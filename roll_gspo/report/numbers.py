"""Numbers as text: one format for pages, legends and tables."""

from __future__ import annotations

import math

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_number(value: float, digits: int = 4, pad: bool = False) -> str:
    """Return `value` with `digits` significant digits.

    Small values use a power of ten. Values close to 1 get six decimals if `digits` is 4 or more: importance ratios
    differ in these.

    Args:
        value: any float.
        digits: significant digits; values of more digits are rounded to whole numbers.
        pad: keep trailing zeros, which align the cells of a table.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if digits >= 4 and 0 < abs(value - 1) < 5e-3:
        return f"{value:.6f}".rstrip("0")
    if abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:#.{digits}g}".rstrip(".") if pad else f"{value:.{digits}g}"


def unit_prefix(value: float) -> tuple[float, str]:
    """Return the divisor and the SI prefix for `value`: (1, "") below 10,000."""
    return next(((size, prefix) for size, prefix in _PREFIXES if value >= max(size, 1e4)), (1.0, ""))


def format_count(value: float) -> str:
    """Return a count with three significant digits and an SI prefix, for example `561 k`."""
    size, prefix = unit_prefix(value)
    return f"{value / size:.3g} {prefix}" if prefix else f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
