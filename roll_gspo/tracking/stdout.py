"""Every figure of every step as text, for logs that are read by eye or grepped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class StdoutTracker:
    """Print the figures of a step, a family (`actor/`, `reward/`, ...) a line."""

    def __init__(self, folder: Path, first_step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one block."""
        families: dict[str, list[str]] = {}
        for name, value in metrics.items():
            family, _, quantity = name.rpartition("/")
            families.setdefault(family, []).append(f"{quantity}={value:.6g}")
        lines = [f"[step {step}] {family}: {' '.join(figures)}" for family, figures in families.items()]
        print("\n".join(lines), flush=True)

    def close(self) -> None:
        """Nothing is held back."""
